#!/usr/bin/env bash
# Trains on several hosts: installs if need be, then runs pretrain.py under `deepspeed`, which starts it by pdsh over ssh.
# Run it on one of the hosts, or on a machine that reaches them; `python -m lime_dist.doctor` looks for trouble beforehand.
#
#   bash launch/multinode.sh HOSTFILE CONFIG [--dry-run] [--verbose] [section.key=value ...]
#
#   HOSTFILE           a line a host: its name and how many processes (GPUs) it runs, "node1 slots=8"; the first is the master
#   CONFIG             a YAML file
#   --dry-run          print what would run on which host, and do nothing
#   --verbose          show DeepSpeed's messages as well
#   section.key=value  handed to pretrain.py, over CONFIG
#
# Example:
#
#   bash launch/multinode.sh launch/hostfile.example configs/cluster/lime_64_2x8.yaml data.path=/shared/shards
#
# The repository, the virtual environment, CONFIG, the shards and the run folder have the same path on all hosts. ssh and
# pdsh work without a password.
#
# Variables. Those that are set travel to all hosts if their names begin with NCCL, GLOO, TORCH, UCX, OMP or PYTHON, or
# are listed in LIME_EXPORT; so does what ~/.deepspeed_env and ./.deepspeed_env say.
#
#   NCCL_SOCKET_IFNAME the network interface between the hosts, on GPUs (default: NCCL guesses)
#   GLOO_SOCKET_IFNAME the same on CPUs (default: the one with the address that the host's name stands for)
#   MASTER_ADDR        the first host's address on that network (default: the first of `hostname -I` there)
#   MASTER_PORT        a port that is free there (default: 29500); two runs on the same hosts need two
#   DS_ACCELERATOR     DeepSpeed's accelerator (default: cuda where torch sees GPUs, else cpu)
#   OMP_NUM_THREADS    threads of each process (default on CPUs: cores / processes of the host)
#   LIME_EXPORT        names of further variables that are to travel, for example "LD_LIBRARY_PATH"
#   LIME_VENV          the virtual environment (default: .venv in the repository)
#   LIME_PYTHON        the interpreter that makes it (default: python3); needs Python >= 3.10
#
# Exit status: the largest of the hosts'; 2 on a mistake in the call, with one line that names it.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "${1:-}" in
  -h | --help) show_help "${BASH_SOURCE[0]}" && exit 0 ;;
  "") fail "no hostfile given; see bash launch/multinode.sh --help" ;;
esac
hostfile="$1"
[[ -f "$hostfile" ]] || fail "no such hostfile: $hostfile"
take_config multinode.sh "${@:2}"

hosts="" counts=""
while read -r host slots rest; do
  [[ -z "$host" || "$host" == "#"* ]] && continue
  [[ "$slots" =~ ^slots=[1-9][0-9]*$ && (-z "$rest" || "$rest" == "#"*) ]] ||
    fail "$hostfile: '$host${slots:+ $slots}${rest:+ $rest}' is not 'HOST slots=N'"
  [[ " $hosts " != *" $host "* ]] || fail "$hostfile: $host stands twice"
  hosts+="$host " counts+="${slots#slots=} "
done < <(cat "$hostfile" && echo)
[[ -n "$hosts" ]] || fail "$hostfile lists no host"

# DeepSpeed takes other variables along from a file, in which blank lines, comments and `export` make it stumble.
travelling() {
  local name line files=()
  for name in "$HOME/.deepspeed_env" .deepspeed_env; do
    if [[ -f "$name" ]]; then files+=("$name"); fi
  done
  if ((${#files[@]})); then
    sed -nE 's/^[[:space:]]*(export[[:space:]]+)?([A-Za-z_][A-Za-z0-9_]*=.*)$/\2/p' "${files[@]}"
  fi
  for name in $(compgen -e); do
    if [[ "$name" =~ ^(NCCL|GLOO|TORCH|UCX|OMP)_ || "$name" == DS_ACCELERATOR || " ${LIME_EXPORT:-} " == *" $name "* ]]; then
      line="$name=${!name}"
      [[ "$line" != *[\"\$\`\\]* && "$line" != *$'\n'* ]] ||
        fail "$name cannot travel to the hosts: its value has a quote, \$, \`, \\ or a line end"
      printf '%s\n' "$line"
    fi
  done
}
variables="$(travelling)"

command=("$bin/deepspeed")
take_quiet "${arguments[@]}"
command+=("${quiet[@]}" --hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}")
if [[ -n "${MASTER_ADDR:-}" ]]; then command+=(--master_addr "$MASTER_ADDR"); fi
command+=("$root/pretrain.py" "${arguments[@]}")

if $dry_run; then
  show_hosts "$hosts" "$counts" "cd $PWD; $(tr '\n' ' ' <<<"$variables")$bin/python -u $root/pretrain.py ${arguments[*]}"
  echo "started from here by: ${command[*]}"
  exit 0
fi
command -v pdsh >/dev/null || fail "pdsh is not installed here; DeepSpeed starts other hosts by it (Debian: apt-get install pdsh)"
# shellcheck disable=SC2119 # no extras
prepare

file="$(mktemp)"
trap 'rm -f "$file"' EXIT
printf '%s\n' "$variables" | sed '/^$/d' >"$file"
export DS_ENV_FILE="$file"
# A host that is gone without a word must not hold the others' end up: ssh alone would wait for it for hours.
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -oServerAliveInterval=15 -oServerAliveCountMax=3"

# With several hosts `deepspeed` itself listens: it ends what it finds of itself on all of them.
stop_hosts() { # stop_hosts PID
  kill -TERM "$1" || true
}
status=0
run_stoppable stop_hosts "${command[@]}" || status=$?
exit "$status"
