#!/usr/bin/env bash
# Check and measure on a machine with a GPU and python3 with a CUDA build of torch. tests/gpu/README.md
# says what to bring there; docs/performance.md what each stage shows.
#
#     tests/gpu/run_all.sh [--te-bundle DIR] [--wheels DIR] [--out DIR] [--call 1|2] [--seconds N]
#                          [--stages NAME...] [--text FILE...] [--dry-run]
#
# Without a network: --te-bundle names a folder whose install.sh, sourced, puts Transformer Engine and
# Megatron-Core on the Python path; --wheels one of wheels for whatever else is missing.
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)

arguments=() bundle="" wheels=""
while [ $# -gt 0 ]; do
  case $1 in
    --te-bundle) bundle=${2:?"--te-bundle needs a folder"}; shift 2 ;;
    --wheels) wheels=${2:?"--wheels needs a folder"}; shift 2 ;;
    *) arguments+=("$1"); shift ;;
  esac
done

# One process, perhaps without a name server: NCCL and gloo would look the host's name up.
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
# install.sh would set 1, which only tensor parallelism needs; copies then wait behind kernels.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-8}
if [ -n "$bundle" ]; then
  # shellcheck source=/dev/null
  source "$bundle/install.sh" || exit 1
fi
if [ -n "$wheels" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
    --target "$site" "$wheels"/*.whl || exit 1
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
python3 -m tests.gpu.run_all --spent "$SECONDS" ${arguments[@]+"${arguments[@]}"}
