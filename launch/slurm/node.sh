#!/usr/bin/env bash
# One node of a job: starts torchrun, and tells its workers to save when SLURM wants the node back.
#
#   node.sh RUN_DIR PYTHON NODES PROCESSES_PER_NODE ENDPOINT ADDRESS,ADDRESS,... ID MAX_RESTARTS
#
# torchrun itself must not hear of it: it would give its workers 30 seconds. The workers get SIGUSR1,
# save at the end of their step, and leave with code 0, which torchrun takes for the end of the run.
set -uo pipefail

run_dir=$1 python=$2 nodes=$3 processes=$4 endpoint=$5 id=$7 max_restarts=$8
IFS=, read -ra addresses <<<"$6"
is_host=0
if ((SLURM_NODEID == 0)); then is_host=1; fi
stopping=
declare -A told=()

trap 'stopping=USR1' USR1 # some time before the limit
trap 'stopping=TERM' TERM # preempted, cancelled, or another node failed

# Deaf, for SLURM may signal all that is below a task, and so are workers until they listen.
(
  trap '' USR1 TERM
  # torch 2.11: with one store for all rounds, the workers of a node look under the number of its own
  # restarts, and nodes count differently: one saw a worker die, the other a node that waits.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGINT
  exec "$python" -m torch.distributed.run \
    --nnodes="$nodes" --nproc-per-node="$processes" \
    --rdzv-backend=c10d --rdzv-endpoint="$endpoint" --rdzv-id="$id" \
    --rdzv-conf="is_host=$is_host" --local-addr="${addresses[SLURM_NODEID]}" \
    --max-restarts="$max_restarts" --signals-to-handle=SIGINT \
    -m hybrid_train resume "run_dir=\"$run_dir\"" # Hydra takes what is in quotes as it stands
) &
torchrun=$!

# Sends SIGUSR1 once to each worker that listens; one that is still starting gets it later.
tell_workers() {
  local pid caught workers
  read -ra workers <<<"$(cat /proc/"$torchrun"/task/*/children 2>/dev/null | tr '\n' ' ')"
  for pid in "${workers[@]}"; do
    [[ -z ${told[$pid]-} ]] || continue
    caught=$(sed -n 's/^SigCgt:\s*//p' /proc/"$pid"/status 2>/dev/null)
    if [[ -n $caught ]] && (((0x$caught >> 9) & 1)); then # SIGUSR1 is number 10
      kill -USR1 "$pid" && told[$pid]=yes
      echo "node $SLURM_NODEID: $stopping from SLURM; told worker $pid to save"
    fi
  done
}

while kill -0 "$torchrun" 2>/dev/null; do
  if [[ -n $stopping ]]; then tell_workers; fi
  sleep 1 &
  wait $! # a signal ends it at once
done
wait "$torchrun"
