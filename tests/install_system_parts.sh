#!/usr/bin/env bash
# Programs of the system that some tests need; without them these are skipped with that reason.
# For Debian and Ubuntu, as root. On Ubuntu, where chromium is a snap, name a browser in CHROMIUM.
set -euo pipefail

packages=(chromium-headless-shell) # tests/unit/jobs/test_report_in_browser.py

export DEBIAN_FRONTEND=noninteractive
missing=()
for package in "${packages[@]}"; do
  dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
done
if ((${#missing[@]})); then
  apt-get update -qq
  apt-get install -qq -y --no-install-recommends "${missing[@]}"
fi
