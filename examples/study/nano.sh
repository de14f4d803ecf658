#!/usr/bin/env bash
# The study at nano size, from raw text to the page: an hour or more on two cores.
#
#     bash examples/study/nano.sh              everything
#     bash examples/study/nano.sh --plan       options go to tools/study.py
#
# Run it as often as you like: what is done is skipped, what was interrupted goes on.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONWARNINGS=ignore

# The quickstart's text, tokenizer and tokens; its reviews for the probe are held out of all three.
text=quickstart/text tokens=quickstart/tokens tokenizer=quickstart/tokenizer
python examples/fetch_text.py --output $text
if [ ! -f $tokenizer/tokenizer.json ]; then
  python tools/train_tokenizer.py --input $text/reviews.jsonl $text/wikipedia.jsonl \
    --vocab-size 8192 --output $tokenizer
fi
for source in reviews wikipedia; do
  python tools/preprocess_data.py --input $text/$source.jsonl --tokenizer $tokenizer \
    --output-prefix $tokens/$source --validation-share 0.02
done

# Data of the evaluation. BLiMP and Winogender are in no package: docs/evaluation.md says how to get
# them; BLIMP and WINOGENDER name their folders.
python examples/study/fetch.py --output study/data \
  ${BLIMP:+--blimp "$BLIMP"} ${WINOGENDER:+--winogender "$WINOGENDER"}

without=()
[ -d study/data/blimp ] || without+=(blimp)
[ -d study/data/winogender ] || without+=(winogender)
exec python tools/study.py --config examples/study/nano.yaml ${without:+--without "${without[@]}"} "$@"
