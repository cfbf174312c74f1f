#!/usr/bin/env bash
# install_cpu.sh FOLDER: the steps of the CPU image, into a new virtual environment at FOLDER, and
# their proof. Dockerfile.cpu runs this file, and so does a test, where no container engine is.
#
# TORCH_INDEX=URL takes torch from another package index first: that of wheels without CUDA, which
# are a tenth of the size. PYTHON=PATH names the Python to use.
set -euo pipefail
folder=${1:?usage: install_cpu.sh FOLDER}
tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

"${PYTHON:-python3.12}" -m venv "$folder"
# shellcheck disable=SC2086 # two words, or none
"$folder/bin/python" -m pip --disable-pip-version-check install --quiet --progress-bar off \
  -c "$tree/constraints.txt" ${TORCH_INDEX:+--extra-index-url $TORCH_INDEX} "$tree"
# From another folder: what was installed is to be found, not the tree beside it.
cd "$folder"
"$folder/bin/python" "$tree/docker/check_imports.py" cpu
