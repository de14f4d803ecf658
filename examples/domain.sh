#!/usr/bin/env bash
# Continue a Hugging Face model (ModernBERT- or Ettin-shaped) on your own text.
#
#     bash examples/domain.sh OUTPUT --model HF_DIR --text 'own/text/*.jsonl' \
#         [--general GENERAL.jsonl --replay 0.1] [--tokenizer NEW_DIR]
#
# OUTPUT/hf is the continued model, OUTPUT/before_after.html what became better or worse. Options are
# those of tools/domain.py. From the environment: LABELS, a file with fields text and label, for the
# accuracy before and after; PROCESSES, one for each GPU (1); TRAIN, options of the training, such as
# "--optimizer.lr 1e-4". Run it again to go on after an interruption.
set -euo pipefail
[ $# -ge 5 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
output=$1
shift
export PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1

python tools/domain.py --output "$output" "$@"
torchrun --standalone --nproc-per-node "${PROCESSES:-1}" -m megatron_ettin.pretrain \
  --config "$output/run.yaml" ${TRAIN:-}
rm -rf "$output/hf"
python tools/convert.py to-hf --checkpoint "$(ls -d "$output"/run/checkpoints/step_???????? | tail -n 1)" \
  --output "$output/hf"
while [ "$1" != --model ]; do shift; done
python tools/before_after.py --run "$output/run" --output "$output" --original "$2" ${LABELS:+--labels "$LABELS"}
