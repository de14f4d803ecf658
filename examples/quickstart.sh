#!/usr/bin/env bash
# From raw text to a trained encoder and its decoder twin as Hugging Face models, with a report.
#
#     make quickstart                        about five minutes on two cores
#     make quickstart QUICKSTART_SHORT=1     the same path with fewer tokens
#
# Run it as often as you like. A step is skipped while the files that it read and wrote are unchanged,
# and an interrupted training resumes. All files are below quickstart/; delete it to start anew.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1-}" in
  "")      length=full  phases="pretrain extension decay" reviews=100000 ;;
  --short) length=short phases=short                      reviews=600 ;;
  *)       echo "usage: bash examples/quickstart.sh [--short]" >&2; exit 2 ;;
esac

# Megatron-Core warns of each missing optional package. Only the fetching needs a network.
export PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1
# By default glibc returns large blocks to the system at once and gets them again, zeroed, a moment
# later. Keeping them halves the page faults of the causal run (1.0 to 0.55 million in 120,000 tokens)
# and saves 1 of 43 seconds of CPU time. The masked run has fewer logits and gains nothing.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296
# Threads that wait for each other sleep instead of spinning. The probe's hidden states then take 8
# instead of 7 seconds on idle cores, but 18 instead of 41 if two other programs keep the cores busy.
export OMP_WAIT_POLICY=passive

# once NAME "READS" "WRITES" COMMAND...: run a command and note the SHA-256 of the files that it read
# and wrote. If they are unchanged at the next call, only print the command's output again.
once() {
  local name=$1 reads=$2 writes=$3 record=quickstart/steps/$1
  shift 3
  content() { echo "$*" && sha256sum -- $reads $writes; }
  if [ -f "$record" ] && [ "$(content "$@" 2>&1)" = "$(cat "$record")" ]; then
    cat "$record.printed"
    echo "up to date: $name"
    return
  fi
  mkdir -p quickstart/steps
  "$@" | tee "$record.printed"
  content "$@" > "$record.unfinished"
  mv "$record.unfinished" "$record"
}

# 1. Real text, a tokenizer, and the text as tokens. The probe's reviews are held out of all three.
text=quickstart/text tokens=quickstart/tokens tokenizer=quickstart/tokenizer
python examples/fetch_text.py --output $text
train_tokenizer() {  # removes the old tokens too: those of two tokenizers must not mix
  rm -rf $tokenizer $tokens
  python tools/train_tokenizer.py --input $text/reviews.jsonl $text/wikipedia.jsonl \
    --vocab-size 8192 --output $tokenizer
}
once tokenizer "$text/reviews.jsonl $text/wikipedia.jsonl" "$tokenizer/*" train_tokenizer
for source in reviews wikipedia; do
  python tools/preprocess_data.py --input $text/$source.jsonl --tokenizer $tokenizer \
    --output-prefix $tokens/$source --validation-share 0.02
done

# 2. Two runs that differ in their objective alone. The folder's name holds the digest of all inputs,
#    so a run never meets the checkpoints of another configuration.
configs="examples/model/nano.yaml examples/data/quickstart.yaml examples/hardware/cpu.yaml"
for phase in $phases; do configs+=" examples/phase/nano/$phase.yaml"; done
inputs="$configs examples/objective/*.yaml $tokenizer/tokenizer.json $tokens/*.bin $tokens/*.idx"
runs=quickstart/runs/$length-$(cat $inputs | sha256sum | cut -c1-8)

train() {  # train OBJECTIVE RUN_DIR
  OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 -m megatron_ettin.pretrain \
    ${configs//examples/--config examples} --config examples/objective/$1.yaml \
    --run_dir $2 --checkpoint.resume true
}
once encoder-$length "$inputs" "$runs/encoder/*.json* $runs/encoder/checkpoints/*/*" \
  train mlm $runs/encoder
once decoder-$length "$inputs" "$runs/decoder/*.json* $runs/decoder/checkpoints/*/*" \
  train clm $runs/decoder

# The proof, from the records of the runs: both saw the same tokens in the same order.
python tools/order.py twins --run $runs/encoder --run $runs/decoder

# 3. Hugging Face folders, made from the last checkpoints.
convert() {  # convert CHECKPOINT OUTPUT
  rm -rf $2
  python tools/convert.py to-hf --checkpoint $1 --output $2
}
for twin in encoder decoder; do
  checkpoint=$(ls -d $runs/$twin/checkpoints/step_???????? | tail -n 1)
  once convert-$twin "$checkpoint/*" "quickstart/hf/$twin/*" \
    convert $checkpoint quickstart/hf/$twin
done

# 4. The report on both.
probe=quickstart/probe-$length.jsonl
head -n $reviews $text/probe.jsonl > $probe
once report "$probe $runs/*/metrics.jsonl $runs/*/checkpoints/*/*" \
  "quickstart/report.* quickstart/summary.json" \
  python tools/report.py --run encoder=$runs/encoder --run decoder=$runs/decoder \
  --output quickstart --probe $probe \
  --masked-text "This is one of the [MASK] movies I have ever seen." \
  --masked-text "The acting was great but the [MASK] was boring." \
  --masked-text "Paris is the capital of [MASK]." \
  --prompt "This movie is" --prompt "Albert Einstein was"
