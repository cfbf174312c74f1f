#!/usr/bin/env bash
# Check a GPU machine: install carried wheels that it lacks, then run what is missing of the stages.
#
#   tests/gpu/run.sh [OPTION ...] [STAGE ...]     as `python -m tests.gpu.check --help` says
#
# PYTHON names the Python that has torch; WHEELS the folder of loads that were carried here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python
fi
wheels=${WHEELS:-gpu_wheels}
site=$PWD/gpu_check/site
mkdir -p "$site"
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
# Compiled kernels, and which of them were fastest, outlive the process of a stage.
export TRITON_CACHE_DIR=$PWD/gpu_check/triton TRITON_CACHE_AUTOTUNING=1

if [[ -f $wheels/wheels.json ]]; then
  "$PYTHON" tests/gpu/wheels.py install "$wheels" "$site"
  kind=$("$PYTHON" -c 'import torch; print(*torch.cuda.get_device_capability(), sep="")' 2>/dev/null) \
    || kind=
fi
if [[ -n ${kind:-} ]]; then
  # Where its wheel was not carried: most stages need it, so they wait.
  "$PYTHON" tests/gpu/wheels.py compile "$wheels" transformer-engine-torch \
    "$site" --architecture "$kind" || echo 'Transformer Engine was not compiled.'
  # The stages that run meanwhile take our own convolution.
  set -m # so that it is a group of processes, which the end of this one ends
  nice "$PYTHON" tests/gpu/wheels.py compile "$wheels" causal-conv1d \
    "$site" --architecture "$kind" >gpu_check/compile.log 2>&1 &
  background=$!
  set +m
  trap 'kill -- "-$background" 2>/dev/null || true' EXIT
fi
"$PYTHON" -m tests.gpu.check "$@"
