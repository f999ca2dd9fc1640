# shellcheck shell=bash
# Functions that the scripts in this folder share. They source this file; do not run it.
#
#   show_help SCRIPT          print the comment page at the top of SCRIPT
#   fail MESSAGE              one line on stderr, exit status 2
#   take_config SCRIPT CONFIG ARGUMENT ...     sets $arguments for pretrain.py, and $dry_run
#   prepare [EXTRA ...]       create the virtual environment and install the project with these extras; uses $bin
#   expand PATH               print a path with ~ and variables expanded, as pretrain.py expands those of the configuration
#   take_devices N            check CUDA_VISIBLE_DEVICES for N processes, and set $pretrain to the command that they run
#   launch N ARGUMENT ...     run pretrain.py under `deepspeed` in N processes on this machine
#   await PID                 wait for a child even if signals interrupt the wait; sets $status
#   run_stoppable STOP COMMAND ...             run COMMAND; if this script gets a signal, call STOP with its process ID
#   shown WORD ...            print a command, quoted where a shell needs it
#   show_hosts HOSTS COUNTS COMMAND            print what runs where; HOSTS are names, COUNTS are processes per host
#
# Variables that users may set:
#
#   LIME_VENV        the virtual environment (default: .venv in the repository)
#   LIME_PYTHON      the interpreter that creates it (default: python3); needs Python >= 3.10
#   CUDA_VISIBLE_DEVICES   the GPUs to use, in any form that CUDA knows (default: all)
#   DS_ACCELERATOR   DeepSpeed's accelerator (default: cpu where torch sees fewer CUDA devices than processes)
#   LIME_BACKEND     nccl or gloo (default: nccl on GPUs, gloo on CPUs); with gloo, processes may share a GPU
#   OMP_NUM_THREADS  threads per process (default: cores / processes)

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

show_help() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$1"
}

fail() {
  echo "error: $*" >&2
  exit 2
}

# Parses the arguments that all scripts take after their own; anything else is a mistake.
take_config() {
  local script="$1" config="${2:-}" argument
  dry_run=false
  [[ -n "$config" ]] || fail "no config given; see bash launch/$script --help"
  config="$(expand "$config")" || exit
  [[ -f "$config" ]] || fail "no such config file: $config"
  arguments=(--config "$config")
  for argument in "${@:3}"; do
    case "$argument" in
      --dry-run) dry_run=true ;;
      --verbose | ?*=*) arguments+=("$argument") ;;
      *) fail "unknown argument '$argument'; see bash launch/$script --help" ;;
    esac
  done
}

# Prints words so that a shell reads them back as they are.
shown() {
  local text
  printf -v text '%q ' "$@"
  echo "${text% }"
}

show_hosts() {
  local hosts counts rank=0 index last
  read -ra hosts <<<"$1"
  read -ra counts <<<"$2"
  for index in "${!hosts[@]}"; do
    last=$((rank + counts[index] - 1))
    echo "${hosts[index]}: ranks $rank-$last: $3"
    rank=$((last + 1))
  done
}

# Runs lime_dist/hostfile.py, which needs no installation.
hostfile_tool() {
  local python="${LIME_PYTHON:-python3}"
  command -v "$python" >/dev/null || python="$bin/python"
  "$python" -I "$root/lime_dist/hostfile.py" "$@"
}

# Expands ~, ~user, $NAME and ${NAME} in a path, as lime_dist/paths.py does.
expand() {
  local text="$1" result="" user name home
  if [[ "$text" == "~"* ]]; then
    user="${text%%/*}" user="${user:1}"
    home="${HOME:-}"
    if [[ -n "$user" ]]; then home="$(getent passwd "$user" | cut -d: -f6)" || true; fi
    [[ -n "$home" ]] || fail "the path '$1': there is no user '$user'"
    result="$home" text="${text:$((${#user} + 1))}"
  fi
  while [[ "$text" =~ ^([^$]*)\$(([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})(.*)$ ]]; do
    name="${BASH_REMATCH[3]}${BASH_REMATCH[4]}"
    [[ -n "${!name:-}" ]] || fail "the path '$1': the variable $name is not set; set it, or write the path out"
    result+="${BASH_REMATCH[1]}${!name}" text="${BASH_REMATCH[5]}"
  done
  printf '%s\n' "$result$text"
}

# Expands a path and makes it absolute, so that it is valid in every directory.
absolute() {
  local path
  path="$(expand "$1")" || exit
  case "$path" in
    /*) printf '%s\n' "$path" ;;
    *) printf '%s\n' "$PWD/$path" ;;
  esac
}

venv="$(absolute "${LIME_VENV:-$root/.venv}")"
bin="$venv/bin"
log="$venv/install.log"
stamp="$venv/lime_dist.installed"

require_python() { # require_python INTERPRETER
  local version
  version="$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2], int(sys.version_info >= (3, 10)))' 2>/dev/null)" ||
    fail "'$1' does not run; set LIME_PYTHON to a Python >= 3.10"
  [[ "$version" == *" 1" ]] || fail "'$1' is Python ${version% *}; set LIME_PYTHON to a Python >= 3.10"
}

# Runs a command with its output in $log. A terminal shows the newest line; after a failure the end of the log is printed.
logged() {
  local line show=false
  if [[ -t 1 ]]; then show=true; fi
  if ! "$@" 2>&1 | while IFS= read -r line; do
    printf '%s\n' "$line" >>"$log"
    if $show; then printf '\r\033[K      %.90s' "$line"; fi
  done; then
    printf '\n' && tail -n 25 "$log" >&2
    echo "error: this command failed: $*" >&2
    echo "error: the end of its output is above, all of it in $log" >&2
    return 1
  fi
  if $show; then printf '\r\033[K'; fi
}

# The first line of the stamp: the clone and its requirements. The second line lists the installed extras.
requirements_key() {
  printf '%s %s\n' "$root" "$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)"
}

is_installed() { # is_installed [EXTRA ...]
  local key="" extras="" extra
  [[ -x "$bin/python" && -f "$stamp" ]] || return 1
  { read -r key && read -r extras; } <"$stamp" || return 1
  [[ "$key" == "$(requirements_key)" ]] || return 1
  for extra in "$@"; do
    [[ " $extras " == *" $extra "* ]] || return 1
  done
}

install() { # install [EXTRA ...]
  local extras="$*" python="${LIME_PYTHON:-python3}" target="$root" words
  : >"$log"
  # Extras of earlier calls stay installed, so they stay in the stamp.
  if [[ -f "$stamp" ]]; then extras="$extras $(sed -n 2p "$stamp")"; fi
  read -ra words <<<"$extras"
  extras="$(printf '%s\n' "${words[@]}" | sort -u | tr '\n' ' ')"
  extras="${extras% }"
  rm -f "$stamp"
  if ! "$bin/python" -m pip --version >/dev/null 2>&1; then
    echo "      creating the virtual environment $venv with $("$python" --version)"
    logged "$python" -m venv "$venv"
  fi
  # torch is installed first and alone, so that no other package can choose its version.
  # --no-compile: pip byte-compiles all of torch in one thread, which took longer than the rest of the installation.
  local pip=("$bin/python" -m pip install --no-input --no-compile -c "$root/constraints.txt")
  echo "      installing torch"
  logged "${pip[@]}" torch
  if [[ -n "$extras" ]]; then target="${root}[${extras// /,}]"; fi
  echo "      installing lime_dist and its dependencies${extras:+, with the extras ${extras// /, }}"
  logged "${pip[@]}" -e "$target"
  echo "      importing them once"
  logged env -u PYTHONDONTWRITEBYTECODE "$bin/python" -c "import deepspeed.pipe, pyarrow.parquet, torch._dynamo, torch.utils.tensorboard"
  { requirements_key && printf '%s\n' "$extras"; } >"$stamp.new"
  mv "$stamp.new" "$stamp"
}

prepare() {
  if is_installed "$@"; then
    echo "      $venv is up to date"
  else
    if [[ -x "$bin/python" ]]; then require_python "$bin/python"; else require_python "${LIME_PYTHON:-python3}"; fi
    mkdir -p "$venv"
    # If two scripts start at the same time, the second waits and finds everything installed.
    (
      flock 9
      is_installed "$@" || install "$@"
    ) 9>"$venv/lime_dist.lock"
  fi
  export PATH="$bin:$PATH"
}

# A signal ends `deepspeed` but not its child, and training would continue. The child passes the signal on to the workers.
stop_child() { # stop_child PID
  pkill -TERM -P "$1" || kill -TERM "$1" || true
}

# Sets $status to the exit status of a child, however often signals interrupt the wait.
await() { # await PID
  local again
  while :; do
    wait "$1" && status=0 || status=$?
    kill -0 "$1" 2>/dev/null || break
  done
  # The child may have ended after an interrupted `wait` and before `kill -0`.
  wait "$1" 2>/dev/null && again=0 || again=$?
  if ((again != 127)); then status=$again; fi
}

run_stoppable() {
  local stop="$1" status=0 stopped=false child
  "${@:2}" &
  child=$!
  trap 'stopped=true; "$stop" "$child"' INT TERM HUP
  await "$child"
  trap - INT TERM HUP
  # `deepspeed` exits with 0 if a signal ended its child, so its own status is not used here.
  if $stopped; then return 143; fi
  # A child that signal s ended gives status 256 - s, and no message. (9 is often the kernel: out of memory.)
  if ((status > 192)); then echo "error: a process of pretrain.py was ended by signal $((256 - status))" >&2; fi
  return "$status"
}

# Sets $quiet to the options that silence `deepspeed`, unless --verbose is among the arguments.
take_quiet() { # take_quiet ARGUMENT ...
  quiet=(--log_level critical)
  if [[ " $* " == *" --verbose "* ]]; then quiet=(); fi
}

# `deepspeed` overwrites or ignores CUDA_VISIBLE_DEVICES, depending on its options and on the form of the value. So it does not
# see the variable here, and each process gets the value of this shell back before it starts.
take_devices() { # take_devices PROCESSES
  local given="${CUDA_VISIBLE_DEVICES:-}" devices
  pretrain=("$root/pretrain.py") restore=()
  if [[ -z "${CUDA_VISIBLE_DEVICES+set}" || "${DS_ACCELERATOR:-}" == cpu ]]; then return; fi
  [[ "$given" != *[!A-Za-z0-9,/_:-]* ]] ||
    fail "CUDA_VISIBLE_DEVICES='$given' is no list of devices; write indices or UUIDs with commas between them"
  IFS=, read -ra devices <<<"$given"
  # An empty value hides all GPUs: the run uses CPUs.
  if [[ -n "$given" && "$given" != -1 && "${LIME_BACKEND:-}" != gloo ]] && ((${#devices[@]} < $1)); then
    fail "CUDA_VISIBLE_DEVICES=$given names ${#devices[@]} device(s) for $1 processes; name one for each, start fewer, or set" \
      "DS_ACCELERATOR=cpu"
  fi
  restore=(--no_python --no_local_rank)
  pretrain=("$(type -P env)" "CUDA_VISIBLE_DEVICES=$given" "$bin/python" -u "$root/pretrain.py")
}

launch() {
  local processes="$1" probe cuda_devices port quiet pretrain restore
  shift
  take_devices "$processes"
  probe="$("$bin/python" -c '
import socket, torch
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    print(torch.cuda.device_count(), probe.getsockname()[1])')"
  read -r cuda_devices port <<<"$probe"
  if [[ "${LIME_BACKEND:-}" == gloo ]] && ((cuda_devices > 0)); then cuda_devices="$processes"; fi
  if [[ -z "${DS_ACCELERATOR:-}" ]] && ((cuda_devices < processes)); then
    if [[ -n "${CUDA_VISIBLE_DEVICES:-}" && "$CUDA_VISIBLE_DEVICES" != -1 ]] && command -v nvidia-smi >/dev/null; then
      fail "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: torch sees $cuda_devices of these devices, $processes processes need one" \
        "each; name devices that exist (nvidia-smi -L), or set DS_ACCELERATOR=cpu"
    fi
    export DS_ACCELERATOR=cpu
  fi
  if [[ -z "${OMP_NUM_THREADS:-}" ]]; then
    export OMP_NUM_THREADS=$(($(nproc) > processes ? $(nproc) / processes : 1))
  fi
  take_quiet "$@"
  echo "      $processes processes, ${DS_ACCELERATOR:-cuda}, $OMP_NUM_THREADS thread(s) each"
  # An empty hostfile means this machine only, even if DeepSpeed's default hostfile exists.
  # A free port, so that two runs on this machine do not collide.
  run_stoppable stop_child env -u CUDA_VISIBLE_DEVICES "$bin/deepspeed" "${quiet[@]}" --hostfile /dev/null \
    --num_gpus "$processes" --master_port "$port" "${restore[@]}" "${pretrain[@]}" "$@"
}
