#!/usr/bin/env bash
# Preprocess many files on a Slurm cluster: an array of 100 jobs, then one that completes the corpus.
#
#     bash examples/data/slurm.sh 'web/*.jsonl.zst' tokenizer tokens/web
#
# Run it on a login node, where sbatch is, in the environment that the jobs shall have (with
# `pip install 'megatron-ettin[datatrove]'`). All machines must see the folders. Run it again after a
# failure: shards that are there are left as they are.
#
#     squeue --me                              the jobs
#     tail PREFIX.logs/shards/slurm_logs/*     what they say; a shard that failed is named
set -euo pipefail
cd "$(dirname "$0")/../.."
python tools/preprocess_data.py --shards --input "$1" --tokenizer "$2" --output-prefix "$3" \
  --executor slurm --tasks 100 \
  --executor-options partition=cpu time=4:00:00 cpus_per_task=8 mem_per_cpu_gb=2 qos=normal
