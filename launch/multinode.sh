#!/usr/bin/env bash
# Trains on several hosts: installs what is missing, then runs pretrain.py under `deepspeed`, which starts it with pdsh over
# ssh. Run it on one of the hosts, or on a machine that can reach them. `python -m lime_dist.doctor` checks the hosts first.
#
#   bash launch/multinode.sh HOSTFILE CONFIG [--dry-run] [--verbose] [section.key=value ...]
#
#   HOSTFILE           one line per host, its name and number of processes (GPUs): "node1 slots=8"; the first is the master
#   CONFIG             a YAML file
#   --dry-run          print what would run on which host without running it
#   --verbose          show DeepSpeed's messages
#   section.key=value  replaces a value of CONFIG
#
# Example:
#
#   bash launch/multinode.sh launch/hostfile.example configs/cluster/lime_64_2x8.yaml data.path=/shared/shards
#
# The repository, the virtual environment, CONFIG, the shards and the run folder must have the same path on all hosts. ssh
# and pdsh must work without a password.
#
# Variables. A variable is sent to all hosts if its name begins with CUDA_, GLOO_, NCCL_, OMP_, PYTHON, PYTORCH_, TORCH_ or UCX_,
# is DS_ACCELERATOR or LIME_BACKEND, or is listed in LIME_EXPORT. So are the variables in ~/.deepspeed_env and ./.deepspeed_env.
#
#   NCCL_SOCKET_IFNAME the network interface between the hosts, on GPUs (default: NCCL guesses)
#   GLOO_SOCKET_IFNAME the same on CPUs (default: the interface whose address the host's name resolves to)
#   MASTER_ADDR        the first host's address on that network (default: the first of `hostname -I` there)
#   MASTER_PORT        a free port on that host (default: 29500); two runs on the same hosts need different ports
#   CUDA_VISIBLE_DEVICES   indices of the GPUs to use on every host (default: all)
#   DS_ACCELERATOR     DeepSpeed's accelerator (default: cuda where torch sees GPUs, else cpu)
#   LIME_BACKEND       nccl or gloo (default: nccl on GPUs, gloo on CPUs)
#   OMP_NUM_THREADS    threads per process (default on CPUs: cores / processes of the host)
#   LIME_EXPORT        names of other variables to send to the hosts, for example "LD_LIBRARY_PATH"
#   LIME_VENV          the virtual environment (default: .venv in the repository)
#   LIME_PYTHON        the interpreter that creates it (default: python3); needs Python >= 3.10
#
# Exit status: the largest of all hosts; 2 for a mistake in the call, with a one-line message.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "${1:-}" in
  -h | --help) show_help "${BASH_SOURCE[0]}" && exit 0 ;;
  "") fail "no hostfile given; see bash launch/multinode.sh --help" ;;
esac
hostfile="$(expand "$1")" || exit
[[ -f "$hostfile" ]] || fail "no such hostfile: $hostfile"
take_config multinode.sh "${@:2}"

listed_hosts="$(hostfile_tool read "$hostfile")" || exit
hosts="" counts="" largest=0
while read -r host count; do
  hosts+="$host " counts+="$count "
  if ((count > largest)); then largest=$count; fi
done <<<"$listed_hosts"
first="${hosts%% *}"
# `deepspeed` would start a single host's processes here, whatever its name, and needs ssh for several.
over_ssh=true
if [[ "$hosts" == "$first " ]] && hostfile_tool here "$first"; then over_ssh=false; fi

# Lines NAME=VALUE of the launcher's files. Blank lines, comments and `export` in them make DeepSpeed fail.
listed_variables() {
  local name files=()
  for name in "$HOME/.deepspeed_env" .deepspeed_env; do
    if [[ -f "$name" ]]; then files+=("$name"); fi
  done
  if ((${#files[@]})); then
    sed -nE 's/^[[:space:]]*(export[[:space:]]+)?([A-Za-z_][A-Za-z0-9_]*=.*)$/\2/p' "${files[@]}"
  fi
}

sent_names() {
  local name
  for name in $(compgen -e); do
    if [[ "$name" == CUDA_VISIBLE_DEVICES ]]; then continue; fi # take_devices passes it on
    if [[ "$name" =~ ^(CUDA|GLOO|NCCL|OMP|PYTORCH|TORCH|UCX)_ || "$name" =~ ^(DS_ACCELERATOR|LIME_BACKEND)$ || " ${LIME_EXPORT:-} " == *" $name "* ]]; then
      [[ "${!name}" != *$'\n'* ]] || fail "$name cannot be sent to the hosts: its value has a newline"
      printf '%s\n' "$name"
    fi
  done
}

# DeepSpeed writes a value with special characters between double quotes, and pdsh replaces %h, %u, %n and %%.
quoted() { # quoted VALUE
  sed -e 's/[\\"$`]/\\&/g' -e 's/%/%%/g' <<<"$1"
}
listed="$(listed_variables)"
names="$(sent_names)"

if [[ -z "${CUDA_VISIBLE_DEVICES+set}" && "$listed" =~ (^|$'\n')CUDA_VISIBLE_DEVICES=([^$'\n']*) ]]; then
  CUDA_VISIBLE_DEVICES="${BASH_REMATCH[2]}"
fi
take_devices "$largest"
if [[ "$hosts" != "$first " && "${CUDA_VISIBLE_DEVICES:-}" == *[A-Z]* ]] && ((${#restore[@]})); then
  fail "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names devices of one machine, and $hostfile lists several; write their indices"
fi

# Nothing may give a word another meaning on its way through `deepspeed`, pdsh, ssh and the shell of a host.
words=("${pretrain[@]}" "${arguments[@]}")
if $over_ssh; then
  [[ "${words[*]}" != *$'\n'* ]] || fail "an argument has a newline, which cannot be sent to the hosts"
  for path in "$PWD" "$bin"; do
    [[ "$path" != *[!A-Za-z0-9_@%+=:,./-]* ]] || fail "$path cannot be sent to the hosts: DeepSpeed does not quote it; move it"
  done
  words_to_send="$(hostfile_tool quote "${words[@]}")" || exit
  mapfile -t words <<<"$words_to_send"
fi
command=("$bin/deepspeed")
take_quiet "${arguments[@]}"
command+=("${quiet[@]}" --hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}")
if ! $over_ssh; then
  command+=(--no_ssh_check --master_addr "${MASTER_ADDR:-127.0.0.1}")
elif [[ -n "${MASTER_ADDR:-}" ]]; then
  command+=(--master_addr "$MASTER_ADDR")
fi
if $over_ssh && [[ "$hosts" == "$first " ]]; then command+=(--force_multi); fi
command+=("${restore[@]}" "${words[@]}")

if $dry_run; then
  variables="${listed:+${listed//$'\n'/ } }"
  for name in $names; do variables+="$(printf '%s=%q ' "$name" "${!name}")"; done
  run=("$bin/python" -u "$root/pretrain.py")
  if ((${#restore[@]})); then run=("${pretrain[@]:1}"); fi
  show_hosts "$hosts" "$counts" "cd $PWD; $variables$(shown "${run[@]}" "${arguments[@]}")"
  echo "started here by: $(shown "${command[@]}")"
  exit 0
fi
if $over_ssh; then
  command -v pdsh >/dev/null || fail "pdsh is not installed here; DeepSpeed needs it to start other hosts (Debian: apt-get install pdsh)"
fi
# shellcheck disable=SC2119 # no extras
prepare

file="$(mktemp)"
trap 'rm -f "$file"*' EXIT
{
  if [[ -n "$listed" ]]; then printf '%s\n' "$listed"; fi
  for name in $names; do printf '%s=%s\n' "$name" "$(quoted "${!name}")"; done
} >"$file"
export DS_ENV_FILE="$file"
# Without these options ssh waits for hours for a host that has disappeared, and the other hosts cannot end.
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -oServerAliveInterval=15 -oServerAliveCountMax=3"

# Over ssh `deepspeed` handles the signal itself: it ends its processes on all hosts.
stop_hosts() { # stop_hosts PID
  kill -TERM "$1" || true
}
# The first host that ssh does not reach, or that cannot use the port of the job, with the reason. `deepspeed` would say it with a
# traceback, and processes of other hosts would wait for minutes. ssh gets the options that pdsh gives it.
host_problem() {
  local host check status
  for host in $hosts; do
    check=true
    if [[ "$host" == "$first" ]]; then check="$bin/python -I $root/lime_dist/hostfile.py port ${MASTER_PORT:-29500}"; fi
    (
      # shellcheck disable=SC2086 # several words
      ssh -n -oBatchMode=yes -oConnectTimeout=10 $PDSH_SSH_ARGS_APPEND "$host" "$check" >/dev/null 2>"$file.$host" &&
        status=0 || status=$?
      echo "$status" >"$file.$host.status"
    ) &
  done
  wait
  for host in $hosts; do
    case "$(<"$file.$host.status")" in
      3) tail -n 1 "$file.$host" ;;
      255) echo "$host cannot be reached with ssh ($(tail -n 1 "$file.$host" | tr -d '\r')); python -m lime_dist.doctor checks the hosts" ;;
      *) continue ;;
    esac
    return
  done
}

unset CUDA_VISIBLE_DEVICES # `deepspeed` would react to it
status=0
if $over_ssh; then
  problem="$(host_problem)"
  [[ -z "$problem" ]] || fail "$problem"
  run_stoppable stop_hosts "${command[@]}" || status=$?
else
  while IFS='=' read -r name value; do if [[ -n "$name" ]]; then export "$name=$value"; fi; done <<<"$listed"
  run_stoppable stop_child "${command[@]}" || status=$?
fi
exit "$status"
