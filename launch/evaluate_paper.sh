#!/usr/bin/env bash
# Evaluates an exported model on the paper's tasks (arXiv 2502.09245) with the LM Evaluation Harness. It needs a network,
# because the tasks are on the Hugging Face hub.
#
#   bash launch/evaluate_paper.sh MODEL [--version 1|2] [--dry-run] [LM_EVAL ARGUMENT ...]
#
#   MODEL              the --output folder of lime_dist.checkpoint.export; results are written to MODEL-lm_eval
#   --version 1        only the tasks of the paper's first version, 1-shot:
#                      ARC-E, ARC-C, Winogrande, COPA, MultiRC, RTE, HellaSwag, PIQA
#   --version 2        only the tasks of its second version, 3-shot:
#                      MultiRC, WiC, QNLI, ARC-E, ARC-C, KV, Induction, LD-3. The paper does not say what the last three
#                      are; we take BIG-bench's key_value_maps and mathematical_induction and BIG-bench Hard's
#                      logical_deduction_three_objects, whose chance levels match the paper's table
#   --dry-run          print the commands without running them
#   LM_EVAL ARGUMENT   passed to lm_eval, for example --device cuda --batch_size 16 --limit 100
#
# Example:
#
#   bash launch/evaluate_paper.sh exported/lime --device cuda --batch_size 16
#
# Variables:
#
#   LIME_VENV          the virtual environment (default: .venv in the repository)
#   LIME_PYTHON        the interpreter that creates it (default: python3); needs Python >= 3.10
#
# Exit status: that of lm_eval; 2 for a mistake in the call or for an export that has been changed, with a one-line message.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "${1:-}" in
  -h | --help) show_help "${BASH_SOURCE[0]}" && exit 0 ;;
  "" | --*) fail "no model given; see bash launch/evaluate_paper.sh --help" ;;
esac
[[ -d "$1" ]] || fail "no such folder: $1; give the --output folder of lime_dist.checkpoint.export"
model="$(absolute "${1%/}")"
shift

dry=false
versions=(1 2)
arguments=()
while (($#)); do
  case "$1" in
    --dry-run) dry=true ;;
    --version)
      [[ "${2:-}" =~ ^[12]$ ]] || fail "--version takes 1 or 2, not '${2:-}'"
      versions=("$2")
      shift
      ;;
    *) arguments+=("$1") ;;
  esac
  shift
done

tasks_1="arc_easy,arc_challenge,winogrande,copa,multirc,rte,hellaswag,piqa"
tasks_2="multirc,wic,qnli,arc_easy,arc_challenge,bigbench_key_value_maps_multiple_choice"
tasks_2+=",bigbench_mathematical_induction_multiple_choice,leaderboard_bbh_logical_deduction_three_objects"
shots_1=1
shots_2=3

if ! $dry; then
  prepare hf eval
  "$bin/python" -c 'import sys; from pathlib import Path; from lime_dist.errors import run_command
from lime_dist.export.exported import verify; run_command(lambda: (verify(Path(sys.argv[1])), None)[1])' "$model"
fi
for version in "${versions[@]}"; do
  tasks="tasks_$version"
  shots="shots_$version"
  command=(
    "$bin/lm_eval" --model hf --model_args "pretrained=$model,trust_remote_code=True" --tasks "${!tasks}"
    --num_fewshot "${!shots}" --output_path "$model-lm_eval/version$version" "${arguments[@]}"
  )
  if $dry; then
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}"
  fi
done
