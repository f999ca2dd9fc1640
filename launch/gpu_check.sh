#!/usr/bin/env bash
# Checks and measures the program on this machine's GPUs, in under ten minutes: installs what is missing, then compares every
# model with the CPU, and measures kernels, memory, steps, tokens/s and MFU. It writes one table, for benchmarks/RESULTS.md.
#
#   bash launch/gpu_check.sh [--output FOLDER] [--python INTERPRETER] [ARGUMENT ...]
#
#   --output FOLDER       for the table and a file and a log of each section (default: runs/gpu_check)
#   --python INTERPRETER  use this Python as it is, and install nothing, as on a machine without a network
#   ARGUMENT              passed to benchmarks/gpu_check.py: --sections NAME ..., --again, --small
#
# Example:
#
#   bash launch/gpu_check.sh
#   bash launch/gpu_check.sh --sections memory kernels --again
#
# Sections that have passed are not repeated. On a machine without a GPU everything runs on the CPU, with small sizes.
#
# Variables:
#
#   CUDA_VISIBLE_DEVICES  the GPUs to use (default: all; two are enough)
#   LIME_VENV             the virtual environment (default: .venv in the repository)
#   LIME_PYTHON           the interpreter that creates it (default: python3); needs Python >= 3.10
#
# Exit status: 0 if no section failed, else 1; 2 for a mistake in the call, with a one-line message.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

output="$root/runs/gpu_check"
python=""
arguments=()
while (($#)); do
  case "$1" in
    -h | --help) show_help "${BASH_SOURCE[0]}" && exit 0 ;;
    --output | --python)
      [[ -n "${2:-}" ]] || fail "$1 needs a value; see bash launch/gpu_check.sh --help"
      if [[ "$1" == --output ]]; then output="$(absolute "$2")"; else python="$2"; fi
      shift
      ;;
    *) arguments+=("$1") ;;
  esac
  shift
done

if [[ -n "$python" ]]; then
  require_python "$python"
else
  # shellcheck disable=SC2119 # no extras
  prepare
  python="$bin/python"
fi
# An interpreter of one's own need not have lime_dist installed.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" "$root/benchmarks/gpu_check.py" --output "$output" "${arguments[@]}"
