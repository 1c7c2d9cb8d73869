# Sourced by the launchers of this folder: usage and refusals, options, and commands that --dry-run prints instead of running.
# shellcheck disable=SC2034  # used by those that source this

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
readonly PREEMPTED=75 # launch/train.py after SIGTERM, its checkpoint saved: "run the same command again"
readonly ABORTED=134  # JAX's processes when another one, or its host, is gone without a word (SIGABRT)
dry_run=false
arguments=() # what stands after --: the arguments of launch/train.py

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }
refuse() { echo "error: $1" >&2; exit 2; }

# parse "VALUED OPTIONS" "SWITCHES" WORDS...: --NAME=VALUE and --NAME VALUE set the variable NAME, a switch sets it to true.
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
      *) refuse "unexpected argument '$1'; the arguments of launch/train.py come after --" ;;
    esac
    if [[ "$known_switches" == *" $option_name "* && "$1" == "--$option_name" ]]; then
      option_value=true
    elif [[ "$known_valued" == *" $option_name "* && "$1" == *=* ]]; then
      option_value="${1#*=}"
    elif [[ "$known_valued" == *" $option_name "* ]]; then
      (($# > 1)) || refuse "$1 needs a value: $1=VALUE"
      option_value="$2"
      shift
    else
      refuse "$1 is not an option here (see --help); the arguments of launch/train.py come after --"
    fi
    printf -v "${option_name//-/_}" '%s' "$option_value"
    shift
  done
}

# need OPTION PATTERN MEANING: refuses an option without a value, or one that does not match the whole pattern.
need() {
  local option_name="${1//-/_}"
  [[ -n "${!option_name}" ]] || refuse "--$1 is missing; give $3"
  [[ "${!option_name}" =~ ^($2)$ ]] || refuse "--$1=${!option_name} cannot be; give $3"
}

# check_arguments FOLDER: refuses training arguments that the launchers cannot start; FOLDER is where workdirs belong.
check_arguments() {
  local word found=false
  ((${#arguments[@]})) || refuse "nothing to train; give launch/train.py's arguments, e.g. -- --config=configs/large.py --workdir=$1/run"
  for word in "${arguments[@]}"; do
    case "$word" in
      --workdir | --workdir=*) found=true ;;
      --distributed* | --num_processes* | --process_id*) refuse "$word is the launcher's to give; leave it out" ;;
      --dry-run) refuse "--dry-run after -- would be training's; write it before --" ;;
    esac
  done
  "$found" || refuse "--workdir is missing after --; give a folder that every host sees, e.g. --workdir=$1/run"
}

# workdir_on FOLDER: refuses a --workdir that is not below FOLDER, where alone it would outlive the hosts.
workdir_on() {
  local word before=""
  for word in "${arguments[@]}"; do
    [[ "$before" != --workdir ]] || word="--workdir=$word"
    [[ "$word" != --workdir=* || "${word#*=}" == "${1%/}"/?* && "${word#*=}/" != */../* ]] || refuse "${word} is no folder on the claim, which is mounted at $1; give --workdir=${1%/}/run, or another --mount"
    before="$word"
  done
}

# quoted WORDS...: one line that a shell reads as the same words.
quoted() {
  local line
  printf -v line ' %q' "$@"
  echo "${line# }"
}

# execute COMMAND...: runs it, or under --dry-run prints it.
execute() {
  if "$dry_run"; then quoted "$@"; else "$@"; fi
}
