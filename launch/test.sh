#!/usr/bin/env bash
# Runs all checks on this machine's CPU: installs what is missing, then runs ruff, mypy and pytest. Stops at a failure.
#
#   bash launch/test.sh [PYTEST ARGUMENT ...]
#
# Arguments are passed to pytest; paths are relative to the repository. Example:
#
#   bash launch/test.sh tests/model -k router -x
#
# Two pytest processes share the files of tests; `-n 0` runs them in one, which a debugger needs.
#
# Variables:
#
#   LIME_VENV          the virtual environment (default: .venv in the repository)
#   LIME_PYTHON        the interpreter that creates it (default: python3); needs Python >= 3.10
#   DS_ACCELERATOR     DeepSpeed's accelerator (default: cpu)
#   OMP_NUM_THREADS    threads per process (default: 1)
#
# Exit status: 0 if all pass; otherwise that of the tool that failed.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "${1:-}" in
  -h | --help) show_help "${BASH_SOURCE[0]}" && exit 0 ;;
esac

echo "[1/4] Install"
prepare test hf
cd "$root"
# The tests need no network and no GPU.
export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
echo "[2/4] ruff"
"$bin/ruff" check
"$bin/ruff" format --check
echo "[3/4] mypy"
"$bin/mypy"
echo "[4/4] pytest"
exec "$bin/python" -m pytest -n 2 --dist loadfile "$@"
