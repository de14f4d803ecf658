"""Tasks that models are compared on; `tasks:` of a YAML file names and configures them."""

from megatron_ettin.evaluation.tasks.task import Family, Measurement, Task, Work

__all__ = ["Family", "Measurement", "Task", "Work"]
