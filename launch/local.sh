#!/usr/bin/env bash
# Train on this machine through torchrun, one process for each GPU, or on CPU processes.
#
#   launch/local.sh experiment=quickstart                                all GPUs
#   launch/local.sh --gpu 2 experiment=quickstart parallel.tensor=2      two GPUs
#   launch/local.sh --cpu 2 experiment=quickstart parallel.tensor=2      two CPU processes
#   launch/local.sh --restarts 3 experiment=quickstart                   after a worker died: again
#
# A restart goes on from the newest checkpoint; history.jsonl in the run folder says what happened.
# Arguments after the options go to `hybrid-train train` as they are.
set -euo pipefail

usage="usage: launch/local.sh [--gpu N | --cpu N] [--restarts N] [key=value ...]"
fail() {
  printf '%s\n%s\n' "$1" "$usage" >&2
  exit 2
}

device=cuda
count=
restarts=0
while [[ ${1-} == -* ]]; do
  case $1 in
    -h | --help)
      sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    --cpu | --gpu)
      [[ ${2-} =~ ^[1-9][0-9]*$ ]] || fail "$1 needs the number of processes, and got '${2-}'."
      [[ $1 == --gpu ]] || device=cpu
      count=$2
      ;;
    --restarts)
      [[ ${2-} =~ ^[0-9]+$ ]] || fail "$1 needs how many are allowed, and got '${2-}'."
      restarts=$2
      ;;
    *) fail "There is no option $1." ;;
  esac
  shift 2
done

# The environment of `make setup` where there is one, else whatever is active.
venv_bin=$(dirname "${BASH_SOURCE[0]}")/../.venv/bin
if [[ -z ${VIRTUAL_ENV-} && -x $venv_bin/torchrun ]]; then
  PATH=$(cd "$venv_bin" && pwd):$PATH
fi
command -v torchrun >/dev/null || fail "torchrun was not found; run 'make setup' first."

if [[ -z $count ]]; then
  count=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
  [[ $count -gt 0 ]] || fail "nvidia-smi lists no GPU; '--cpu N' trains on N CPU processes."
fi

# torchrun takes seconds until the first process speaks.
printf 'Starting: %s x hybrid-train train runtime.device=%s %s\n' "$count" "$device" "$*" >&2
exec torchrun --standalone --nproc-per-node "$count" --max-restarts "$restarts" \
  -m hybrid_train train "runtime.device=$device" "$@"
