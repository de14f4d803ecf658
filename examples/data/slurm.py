"""Preprocess a corpus on a Slurm cluster: a job for each few shards, then one that joins them.

    python examples/data/slurm.py --input 'web/*.jsonl.zst' --output-prefix tokens/web \\
        --tokenizer tokenizer --tasks 100 --partition cpu --time 4:00:00 --cpus-per-task 8

Run it on a login node, where sbatch is, in the environment that the jobs shall have. Every input is
a shard, and a task takes each hundredth of them here. All machines must see the folder. Run
it again after a failure: shards that are there are left as they are.

    squeue --me                              the jobs
    tail PREFIX.logs/shards/slurm_logs/*     what they say; a shard that failed is named
    ls PREFIX.logs/shards/completions        tasks that are done
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_ettin.data.preprocess import PreprocessOptions
from megatron_ettin.data.readers import expand_inputs


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, submit, print the number of the last job."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="files or globs, the shards")
    add("--output-prefix", type=Path, required=True, metavar="PREFIX")
    add("--tokenizer", type=Path, required=True, metavar="FOLDER")
    add("--tasks", type=int, required=True, help="jobs of the array")
    add("--at-a-time", type=int, default=-1, help="jobs that run at a time; default: all")
    add("--partition", required=True)
    add("--time", required=True, help="limit for one task, as sbatch takes it")
    add("--cpus-per-task", type=int, default=4)
    add("--mem-per-cpu-gb", type=int, default=2)
    add("--qos", help="default: the cluster's")
    args = parser.parse_args(arguments)
    try:
        from megatron_ettin.data.datatrove_step import run_on

        options = PreprocessOptions(
            inputs=expand_inputs(args.input),
            output_prefix=args.output_prefix.resolve(),
            tokenizer=args.tokenizer.resolve(),
        )
        job = run_on(
            "slurm",
            options,
            args.tasks,
            workers=args.at_a_time,
            partition=args.partition,
            time=args.time,
            cpus_per_task=args.cpus_per_task,
            mem_per_cpu_gb=args.mem_per_cpu_gb,
            qos=args.qos,
        )
    except (ImportError, ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{options.output_prefix}: complete when job {job} has ended")


if __name__ == "__main__":
    main()
