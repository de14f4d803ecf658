#!/usr/bin/env bash
# Train on two nodes with eight GPUs each under Slurm, as often as the time limit makes it necessary:
#
#     sbatch examples/launch/slurm.sh
#
# Submit it from a clone of this project in a folder that all nodes share, in the environment that the
# job shall have. Two minutes before the time limit the run saves, ends and is queued again. After the
# failure of a node Slurm queues it again, and it goes on from the newest checkpoint.
#SBATCH --job-name=150m-encoder
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
set -euo pipefail
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # lets a node that was started again come in
export OMP_NUM_THREADS=1

# Ask the run to save and to end; queue the job again, also if torchrun has to kill it.
queue_again() {
  kill -USR1 "$run"  # srun passes it on to each torchrun
  wait "$run" || true
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
trap queue_again USR1

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 8 \
  --max-restarts 3 --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:29400" \
  --signals-to-handle SIGTERM,SIGUSR1 --shutdown-timeout 100 \
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
  --checkpoint.resume true &
run=$!
wait "$run"  # unlike a program in the foreground, it lets a signal in
