"""Tasks that models are compared on; `tasks:` of a YAML file names and configures them."""

from megatron_ettin.evaluation.tasks.task import Family, Task, TaskScores, TaskWork

__all__ = ["Family", "Task", "TaskScores", "TaskWork"]
