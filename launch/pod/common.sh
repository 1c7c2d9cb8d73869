# Sourced by the launchers in this folder: help, errors, options, and commands that --dry-run prints.
# shellcheck disable=SC2034  # the scripts that source this use the variables

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
readonly PREEMPTED=75 # exit code of launch/train.py after SIGTERM: a checkpoint is saved, run the same command again
readonly ABORTED=134  # exit code of a JAX process (SIGABRT) when another process or its host has died
dry_run=false
arguments=() # the words after --: the arguments of launch/train.py

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }
refuse() { echo "error: $1" >&2; exit 2; }

# parse "VALUED OPTIONS" "SWITCHES" WORDS...: --NAME=VALUE and --NAME VALUE set the variable NAME to
# VALUE, and a switch --NAME sets it to true.
parse() {
  local known_valued=" $1 " known_switches=" $2 dry-run " option_name option_value
  shift 2
  while (($#)); do
    option_name="${1%%=*}"
    option_name="${option_name#--}"
    case "$1" in
      -h | --help) usage; exit 0 ;;
      --) shift; arguments=("$@"); return 0 ;;
      --*) [[ "$option_name" =~ ^[a-z-]+$ ]] || option_name="?" ;;
      *) refuse "unexpected argument: got '$1', expected an option. Write the arguments of launch/train.py after --." ;;
    esac
    if [[ "$known_switches" == *" $option_name "* && "$1" == "--$option_name" ]]; then
      option_value=true
    elif [[ "$known_valued" == *" $option_name "* && "$1" == *=* ]]; then
      option_value="${1#*=}"
    elif [[ "$known_valued" == *" $option_name "* ]]; then
      (($# > 1)) || refuse "$1: got no value, expected $1=VALUE"
      option_value="$2"
      shift
    else
      refuse "$1: unknown option. See --help, and write the arguments of launch/train.py after --."
    fi
    printf -v "${option_name//-/_}" '%s' "$option_value"
    shift
  done
}

# need OPTION PATTERN MEANING: exits with an error unless the value of the option matches the pattern.
need() {
  local option_name="${1//-/_}"
  [[ -n "${!option_name}" ]] || refuse "--$1: missing, expected $3"
  [[ "${!option_name}" =~ ^($2)$ ]] || refuse "--$1: got '${!option_name}', expected $3"
}

# check_arguments FOLDER: exits with an error for training arguments that a launcher cannot pass on.
# FOLDER is where workdirs belong.
check_arguments() {
  local word found=false
  ((${#arguments[@]})) || refuse "no arguments of launch/train.py. Write them after --, for example -- --config=configs/large.py --workdir=$1/run."
  for word in "${arguments[@]}"; do
    case "$word" in
      --workdir | --workdir=*) found=true ;;
      --distributed* | --num_processes* | --process_id*) refuse "$word: the launcher sets this option. Remove it." ;;
      --dry-run) refuse "--dry-run: got it after --, expected it before. What follows -- goes to launch/train.py." ;;
    esac
  done
  "$found" || refuse "--workdir: missing after --, expected a folder that all hosts share, for example --workdir=$1/run"
}

# workdir_on FOLDER: exits with an error unless --workdir is inside FOLDER, the only folder that outlives
# the hosts.
workdir_on() {
  local word before=""
  for word in "${arguments[@]}"; do
    [[ "$before" != --workdir ]] || word="--workdir=$word"
    [[ "$word" != --workdir=* || "${word#*=}" == "${1%/}"/?* && "${word#*=}/" != */../* ]] || refuse "--workdir: got '${word#*=}', expected a folder inside the claim's mount $1. Use --workdir=${1%/}/run, or change --mount."
    before="$word"
  done
}

# quoted WORDS...: prints one line that a shell parses into the same words.
quoted() {
  local line
  printf -v line ' %q' "$@"
  echo "${line# }"
}

# execute COMMAND...: runs the command, or prints it with --dry-run.
execute() {
  if "$dry_run"; then quoted "$@"; else "$@"; fi
}
