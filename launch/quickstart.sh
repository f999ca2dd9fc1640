#!/usr/bin/env bash
# Runs everything on this machine, end to end: installs, collects a corpus of documentation text, trains a tokenizer,
# writes shards, and trains a 16-layer LIMe decoder as a two-stage pipeline.
#
#   bash launch/quickstart.sh [--steps N] [--fresh] [--verbose] [section.key=value ...]
#
# A second call reuses every complete step and resumes training from the newest checkpoint.
#
#   --steps N          train N steps (train.steps=N)
#   --fresh            first delete the data folder and the run folder of an earlier call
#   --verbose          show DeepSpeed's messages
#   section.key=value  replaces a value of configs/quickstart.yaml
#
# Example, LLaMA on the same data, to compare with LIMe:
#
#   bash launch/quickstart.sh model.architecture=llama run.directory=runs/quickstart-llama
#
# Variables:
#
#   LIME_DATA          corpus, tokenizer and shards (default: data/quickstart in the repository)
#   LIME_RUN           the run folder (default: runs/quickstart in the repository); run.directory=... overrides it
#   LIME_VENV          the virtual environment (default: .venv in the repository)
#   LIME_PYTHON        the interpreter that creates it (default: python3); needs Python >= 3.10
#   CUDA_VISIBLE_DEVICES   the GPUs to use, in any form that CUDA knows (default: all)
#   DS_ACCELERATOR     DeepSpeed's accelerator (default: cpu where torch sees fewer than two CUDA devices)
#   OMP_NUM_THREADS    threads per process (default: cores / 2)
#
# Exit status: 0 on success; 2 for a mistake in the call, with a one-line message; otherwise that of the step that failed.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

data="$(absolute "${LIME_DATA:-$root/data/quickstart}")"
run="$(absolute "${LIME_RUN:-$root/runs/quickstart}")"
fresh=false
arguments=()

while (($#)); do
  case "$1" in
    -h | --help) show_help "${BASH_SOURCE[0]}" && exit 0 ;;
    --steps)
      [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || fail "--steps takes a positive number, not '${2:-}'"
      arguments+=("train.steps=$2")
      shift
      ;;
    --fresh) fresh=true ;;
    --verbose) arguments+=("$1") ;;
    run.directory=?*) run="$(absolute "${1#*=}")" ;;
    ?*=*) arguments+=("$1") ;;
    *) fail "unknown argument '$1'; see bash launch/quickstart.sh --help" ;;
  esac
  shift
done

take_devices 2 # before everything else: it may refuse

# --fresh deletes only folders that have our mark (or pretrain.py's config.yaml).
mark="$data/.made-by-quickstart"
if $fresh; then
  [[ ! -e "$data" || -f "$mark" ]] || fail "--fresh: $data was not made by this script; delete it yourself, or set LIME_DATA"
  [[ ! -e "$run" || -f "$run/config.yaml" ]] || rmdir "$run" 2>/dev/null ||
    fail "--fresh: $run holds no run (no config.yaml); delete it yourself, or set LIME_RUN"
  for folder in "$data" "$run"; do
    if [[ -e "$folder" ]]; then
      echo "deleting $folder"
      rm -rf "$folder"
    fi
  done
fi
if [[ ! -e "$data" ]]; then
  mkdir -p "$data"
  touch "$mark"
fi

# The command has no `||` around it, because bash would then ignore all failures inside it.
current=""
step() { # step N TITLE COMMAND ...
  local started=$SECONDS
  current="[$1/5]"
  echo "$current $2"
  "${@:3}"
  echo "      done in $((SECONDS - started)) s"
  current=""
}
trap 'status=$?; [[ -z "$current" ]] || echo "$current failed with exit status $status after $SECONDS s in all" >&2' EXIT

step 1 "Install" prepare
step 2 "Collect documentation text as a corpus" \
  "$bin/python" -m data_tools.sources embedded --output "$data/corpus" --max-megabytes 10
step 3 "Train a tokenizer" \
  "$bin/python" -m data_tools.tokenizer train --input "$data/corpus" --output "$data/tokenizer" --vocab-size 4096
step 4 "Write shards" \
  "$bin/python" -m data_tools.pretokenize --input "$data/corpus" --tokenizer "$data/tokenizer" --output "$data/shards" \
  --workers 2 --validation-fraction 0.03
step 5 "Train on a two-stage pipeline" \
  launch 2 --config "$root/configs/quickstart.yaml" "data.path=$data/shards" "run.directory=$run" "${arguments[@]}"
