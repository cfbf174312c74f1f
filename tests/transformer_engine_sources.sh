#!/usr/bin/env bash
# transformer_engine_sources.sh FOLDER: unpack the Python files of Transformer Engine into a folder.
# They hold reference quantizers that tests compare with; its compiled parts need a GPU to be of use.
set -euo pipefail
folder=$1
package=transformer-engine-cu13==2.20.2
python=$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python

[[ -d $folder/transformer_engine ]] && exit 0
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"$python" -m pip --disable-pip-version-check --quiet download --no-deps --dest "$wheels" "$package"
mkdir -p "$folder"
"$python" - "$wheels"/*.whl "$folder" <<'PYTHON'
import sys
import zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    wheel.extractall(sys.argv[2], [name for name in wheel.namelist() if name.endswith(".py")])
PYTHON
