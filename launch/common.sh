# shellcheck shell=bash
# What the scripts in this folder share. Sourced by them, never run.
#
#   show_help SCRIPT          print the comment page at the top of SCRIPT
#   fail MESSAGE              one line on stderr, exit status 2
#   take_config SCRIPT CONFIG ARGUMENT ...     sets $arguments for pretrain.py, and $dry_run
#   prepare [EXTRA ...]       make the virtual environment and install the project with these extras; sets $bin
#   launch N ARGUMENT ...     run pretrain.py under `deepspeed` in N processes on this machine
#   await PID                 wait for a child through signals; sets $status
#   run_stoppable STOP COMMAND ...             run COMMAND; on a signal to this script call STOP with its process number
#   show_hosts HOSTS COUNTS COMMAND            print what runs where: names and processes of hosts, a word each
#
# Variables that a user may set:
#
#   LIME_VENV        the virtual environment (default: .venv in the repository)
#   LIME_PYTHON      the interpreter that makes it (default: python3); needs Python >= 3.10
#   DS_ACCELERATOR   DeepSpeed's accelerator (default: cpu where torch sees fewer CUDA devices than processes)
#   OMP_NUM_THREADS  threads of each process (default: cores / processes)

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

show_help() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$1"
}

fail() {
  echo "error: $*" >&2
  exit 2
}

# What all scripts take after their own arguments; whatever else stands there is a mistake.
take_config() {
  local script="$1" config="${2:-}" argument
  dry_run=false
  [[ -n "$config" ]] || fail "no config given; see bash launch/$script --help"
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

# Absolute, so that the environment is found from every directory.
absolute() {
  case "$1" in
    /*) printf '%s\n' "$1" ;;
    *) printf '%s\n' "$PWD/$1" ;;
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

# Runs a command with its output in $log. A terminal shows the newest line meanwhile; a failure shows the end of the log.
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

# What the stamp holds: first the clone and its requirements, then the extras that are installed.
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
  # Extras of an earlier call stay installed, so they stay in the stamp.
  if [[ -f "$stamp" ]]; then extras="$extras $(sed -n 2p "$stamp")"; fi
  read -ra words <<<"$extras"
  extras="$(printf '%s\n' "${words[@]}" | sort -u | tr '\n' ' ')"
  extras="${extras% }"
  rm -f "$stamp"
  if ! "$bin/python" -m pip --version >/dev/null 2>&1; then
    echo "      making the virtual environment $venv with $("$python" --version)"
    logged "$python" -m venv "$venv"
  fi
  # torch comes first and alone: whatever is asked for after it cannot choose another one.
  # --no-compile: pip would byte-compile all of torch in one thread, which took longer than all the rest.
  local pip=("$bin/python" -m pip install --no-input --no-compile -c "$root/constraints.txt")
  echo "      installing torch"
  logged "${pip[@]}" torch
  if [[ -n "$extras" ]]; then target="${root}[${extras// /,}]"; fi
  echo "      installing lime_dist and its libraries${extras:+, with the extras ${extras// /, }}"
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
    # Two scripts started together: the second waits, then finds the work done.
    (
      flock 9
      is_installed "$@" || install "$@"
    ) 9>"$venv/lime_dist.lock"
  fi
  export PATH="$bin:$PATH"
}

# `deepspeed` dies of a signal without telling its child, and training would go on; the child does tell the workers.
stop_child() { # stop_child PID
  pkill -TERM -P "$1" || kill -TERM "$1" || true
}

# Sets $status to a child's exit status, however often signals interrupt the waiting.
await() { # await PID
  local again
  while :; do
    wait "$1" && status=0 || status=$?
    kill -0 "$1" 2>/dev/null || break
  done
  # It may have ended between an interrupted wait and the question whether it is still there.
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
  # Not `deepspeed`'s own status: it takes a child that a signal ended for a success.
  if $stopped; then return 143; fi
  # A signal -s reaches us as 256 - s, and nobody has said so yet (9 is often the kernel, out of memory).
  if ((status > 192)); then echo "error: a process of pretrain.py was ended by signal $((256 - status))" >&2; fi
  return "$status"
}

# Sets $quiet: what keeps `deepspeed`'s own messages back unless --verbose is among the arguments.
take_quiet() { # take_quiet ARGUMENT ...
  quiet=(--log_level critical)
  if [[ " $* " == *" --verbose "* ]]; then quiet=(); fi
}

launch() {
  local processes="$1" probe cuda_devices port quiet
  shift
  probe="$("$bin/python" -c '
import socket, torch
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    print(torch.cuda.device_count(), probe.getsockname()[1])')"
  read -r cuda_devices port <<<"$probe"
  if [[ -z "${DS_ACCELERATOR:-}" ]] && ((cuda_devices < processes)); then
    export DS_ACCELERATOR=cpu
  fi
  if [[ -z "${OMP_NUM_THREADS:-}" ]]; then
    export OMP_NUM_THREADS=$(($(nproc) > processes ? $(nproc) / processes : 1))
  fi
  take_quiet "$@"
  echo "      $processes processes, ${DS_ACCELERATOR:-cuda}, $OMP_NUM_THREADS thread(s) each"
  # A hostfile that is no file: this machine alone, even where DeepSpeed's default hostfile exists.
  # A free port: a second run on this machine does not collide with the first.
  run_stoppable stop_child "$bin/deepspeed" "${quiet[@]}" --hostfile /dev/null --num_gpus "$processes" \
    --master_port "$port" "$root/pretrain.py" "$@"
}
