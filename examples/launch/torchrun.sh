#!/usr/bin/env bash
# Train on two hosts with eight GPUs each, by hand. Run the same command on both, in a clone of this
# project in a folder that both share; HOST is the name or address of the first:
#
#     bash examples/launch/torchrun.sh HOST
#
# Run it on both again after a failure: it goes on from the newest checkpoint. A single host that
# failed may start alone again within ten minutes, unless it is HOST (docs/launching.md).
set -euo pipefail
cd "$(dirname "$0")/../.."
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # lets a host that was started again come in
export OMP_NUM_THREADS=1
exec torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 10 \
  --rdzv-backend c10d --rdzv-id ettin --rdzv-endpoint "$1:29400" \
  -m megatron_ettin.pretrain \
  --config examples/model/150m.yaml \
  --config examples/objective/mlm.yaml \
  --config examples/phase/pretrain.yaml \
  --config examples/phase/extension.yaml \
  --config examples/phase/decay.yaml \
  --config examples/data/ettin.yaml \
  --config examples/hardware/8xh100.yaml \
  --run_dir runs/150m-encoder \
  --checkpoint.save_every_tokens 2_000_000_000 \
  --trouble.hang_seconds 600 \
  --checkpoint.resume true
