#!/usr/bin/env bash
# build.sh gpu|cpu [NAME=VALUE ...]: build an image with the versions of versions.env; NAME=VALUE
# replaces one of them: docker/build.sh gpu CUDA_ARCHS=8.0. The tag is hybrid_train:gpu or :cpu.
# Only what the Dockerfile asks for is handed on, and all that it asks for must be there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in
  gpu) file=docker/Dockerfile ;;
  cpu) file=docker/Dockerfile.cpu ;;
  *) echo 'usage: docker/build.sh gpu|cpu [NAME=VALUE ...]' >&2; exit 2 ;;
esac
kind=$1
shift

declare -A versions
while IFS='=' read -r name value; do
  versions[$name]=$value
done < <(grep --extended-regexp '^[A-Z0-9_]+=' docker/versions.env)
for pair in "$@"; do
  name=${pair%%=*}
  [[ -v versions[$name] ]] || { echo "build.sh: versions.env has no $name" >&2; exit 2; }
  versions[$name]=${pair#*=}
done

arguments=()
while read -r name; do
  [[ -v versions[$name] ]] || { echo "build.sh: $file asks for $name, versions.env has none" >&2; exit 2; }
  argument=--build-arg="$name=${versions[$name]}"
  [[ " ${arguments[*]:-} " == *" $argument "* ]] || arguments+=("$argument")
done < <(sed -n 's/^ARG \([A-Z0-9_]*\)$/\1/p' "$file")
set -x
docker build --file "$file" --tag "hybrid_train:$kind" "${arguments[@]}" .
