#!/usr/bin/env bash
# Submit a study to Slurm: one job array for each kind of stage, each after the one before.
#
#     bash examples/study/slurm.sh examples/study/150m.yaml --partition=gpu --gpus=4
#
# Further options go to sbatch. A stage is one command for one job. Call the script again to go on
# after jobs that were killed: what is done is skipped. An arm that starts from a crossing needs a
# second call, after the first crossings.
set -euo pipefail
config=$1
shift
lists=study/lists/$(basename "$config" .yaml)
mkdir -p "$lists"
python tools/study.py --config "$config" --list > "$lists/all"
before=
for kind in train cross proof export evaluate series page; do
  grep -E "^$kind(/|$)" "$lists/all" > "$lists/$kind" || continue  # this study has none
  # Each job runs the line of the list that its number in the array names. The array starts when the
  # one before has ended, whether or not all its jobs succeeded: a stage whose inputs are missing
  # says so, and the others run.
  before=$(sbatch --parsable --array="1-$(wc -l < "$lists/$kind")" --job-name="study-$kind" \
    ${before:+--dependency="afterany:$before"} "$@" --wrap \
    "python tools/study.py --config '$config' --only \"\$(sed -n \${SLURM_ARRAY_TASK_ID}p '$lists/$kind')\"")
  echo "$kind: job array $before"
done
