#!/usr/bin/env bash
# Trains on this machine with any configuration: installs what is missing, then runs pretrain.py under `deepspeed`.
#
#   bash launch/local.sh CONFIG [PROCESSES] [--dry-run] [--verbose] [section.key=value ...]
#
#   CONFIG             a YAML file
#   PROCESSES          number of processes (default: 2): parallel.pipeline_stages times the data-parallel width
#   --dry-run          print what would run without running it
#   --verbose          show DeepSpeed's messages
#   section.key=value  replaces a value of CONFIG
#
# Example:
#
#   bash launch/local.sh configs/quickstart.yaml 4 parallel.pipeline_stages=4 \
#     data.path=data/quickstart/shards run.directory=runs/four-stages
#
# Variables:
#
#   LIME_VENV          the virtual environment (default: .venv in the repository)
#   LIME_PYTHON        the interpreter that creates it (default: python3); needs Python >= 3.10
#   CUDA_VISIBLE_DEVICES   the GPUs to use, in any form that CUDA knows: indices, UUIDs, MIG devices (default: all)
#   DS_ACCELERATOR     DeepSpeed's accelerator (default: cpu where torch sees fewer CUDA devices than PROCESSES)
#   LIME_BACKEND       nccl or gloo (default: nccl on GPUs, gloo on CPUs); with gloo, processes may share a GPU
#   OMP_NUM_THREADS    threads per process (default: cores / PROCESSES)
#
# Exit status: that of pretrain.py; 2 for a mistake in the call, with a one-line message.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "${1:-}" in
  -h | --help) show_help "${BASH_SOURCE[0]}" && exit 0 ;;
esac

processes=2
if [[ "${2:-}" =~ ^[1-9][0-9]*$ ]]; then
  processes="$2"
  set -- "$1" "${@:3}"
fi
take_config local.sh "$@"

take_devices "$processes"
if $dry_run; then
  command=("$bin/python" -u "$root/pretrain.py")
  if ((${#restore[@]})); then command=("${pretrain[@]:1}"); fi
  show_hosts "$(uname -n)" "$processes" "$(shown "${command[@]}" "${arguments[@]}")"
  exit 0
fi
# shellcheck disable=SC2119 # no extras
prepare
launch "$processes" "${arguments[@]}"
