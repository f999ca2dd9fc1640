#!/usr/bin/env bash
# The main job, end to end, on this machine: installs, gathers a corpus of documentation text, trains a tokenizer,
# writes shards, and trains a 16-layer LIMe decoder as a two-stage pipeline.
#
#   bash launch/quickstart.sh [--steps N] [--fresh] [--verbose] [section.key=value ...]
#
# A second call re-uses whatever is complete, and training goes on from its newest checkpoint.
#
#   --steps N          train N steps (train.steps=N)
#   --fresh            first delete the data folder and the run folder that an earlier call made
#   --verbose          show DeepSpeed's messages as well
#   section.key=value  handed to pretrain.py, over configs/quickstart.yaml
#
# Example, LLaMA beside LIMe on the same data:
#
#   bash launch/quickstart.sh model.architecture=llama run.directory=runs/quickstart-llama
#
# Variables:
#
#   LIME_DATA          corpus, tokenizer and shards (default: data/quickstart in the repository)
#   LIME_RUN           the run folder (default: runs/quickstart in the repository); run.directory=... goes before it
#   LIME_VENV          the virtual environment (default: .venv in the repository)
#   LIME_PYTHON        the interpreter that makes it (default: python3); needs Python >= 3.10
#   DS_ACCELERATOR     DeepSpeed's accelerator (default: cpu where torch sees fewer than two CUDA devices)
#   OMP_NUM_THREADS    threads of each process (default: cores / 2)
#
# Exit status: 0 on success; 2 on a mistake in the call, with one line that names it; otherwise that of the step that failed.

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

# Only folders that carry our mark (or pretrain.py's config.yaml) are ever deleted.
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

# No `||` around the command: bash would ignore every failure inside it.
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
step 2 "Gather documentation text as a corpus" \
  "$bin/python" -m data_tools.sources embedded --output "$data/corpus" --max-megabytes 10
step 3 "Train a tokenizer" \
  "$bin/python" -m data_tools.tokenizer train --input "$data/corpus" --output "$data/tokenizer" --vocab-size 4096
step 4 "Write shards" \
  "$bin/python" -m data_tools.pretokenize --input "$data/corpus" --tokenizer "$data/tokenizer" --output "$data/shards" \
  --workers 2 --validation-fraction 0.03
step 5 "Train on a two-stage pipeline" \
  launch 2 --config "$root/configs/quickstart.yaml" "data.path=$data/shards" "run.directory=$run" "${arguments[@]}"
