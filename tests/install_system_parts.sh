#!/usr/bin/env bash
# Programs of the system that some tests need, on Debian and Ubuntu as root. Elsewhere nothing is
# installed, and these tests are skipped with their reason.
set -euo pipefail

packages=(
  chromium-headless-shell # tests/unit/jobs/test_report_in_browser.py
  zsh # tests/docs, tests/unit/config/test_command_text.py
  slurmctld slurmd slurm-client munge # tests/slurm; their services need not run
)

missing=()
for package in "${packages[@]}"; do
  dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
done
if ((${#missing[@]} == 0)); then
  echo "all there: ${packages[*]}"
elif ! command -v apt-get >/dev/null || ((EUID != 0)); then
  echo "not installed, which needs apt-get and root: ${missing[*]}"
else
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -qq -y --no-install-recommends "${missing[@]}"
fi
