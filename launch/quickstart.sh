#!/usr/bin/env bash
# Trains all four stages at tiny size on two CPU cores, prints samples and writes a report.
#
#   bash launch/quickstart.sh [WORKDIR] [--corpus=stories|pydocs|FOLDER] [--config=FILE]
#
#   WORKDIR    folder for everything it creates; default runs/CORPUS. To resume a stopped run, run
#              the same command again.
#   --corpus   stories (default): texts of a grammar with exact oracles; 23 minutes on two cores of a
#              shared machine. pydocs: the documentation of this Python. Or a folder, glob or file
#              of your own text.
#   --config   experiment file; default configs/tiny.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() { sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
usage_error() { echo "error: $1" >&2; exit 2; }

workdir="" corpus="" config=""
while (($#)); do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --corpus=*) corpus="${1#*=}" ;;
    --config=*) config="${1#*=}" ;;
    --corpus | --config)
      (($# > 1)) || usage_error "$1 has no value. Give one, $1=VALUE."
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    -*) usage_error "$1 is not an option, expected --corpus or --config. See --help." ;;
    *)
      [[ -z "$workdir" ]] || usage_error "WORKDIR: got two, $workdir and $1, expected one."
      workdir="$1"
      ;;
  esac
  shift
done
if [[ -n "$corpus" && "$corpus" != stories && "$corpus" != pydocs ]]; then
  compgen -G "$corpus" > /dev/null || usage_error "--corpus=$corpus: no such folder or file. Give stories, pydocs, or text of your own."
  # Absolute, because it becomes part of the config.
  [[ -e "$corpus" ]] && corpus="$(cd "$(dirname "$corpus")" && pwd)/$(basename "$corpus")"
fi
if [[ -z "$workdir" ]]; then
  name="${corpus:-${config:+$(basename "$config" .py)}}"
  workdir="$ROOT/runs/$(basename "${name:-stories}")"
fi
config="${config:-$ROOT/configs/tiny.py}"
[[ -f "${config%%:*}" ]] || usage_error "--config=$config: no such file."
config="$config${corpus:+:$corpus}"

setup_environment || exit 1
begun=$SECONDS
samples="$workdir/samples/quickstart.jsonl"
"$PYTHON" "$ROOT/launch/train.py" --config="$config" --workdir="$workdir" --stage=all
echo
echo "samples:"
"$PYTHON" "$ROOT/launch/sample.py" --workdir="$workdir" --num=8 --out="$samples"
"$PYTHON" -c 'import json, sys; [print("  |", json.loads(line)["text"].replace("\n", "\n  |   ")) for line in open(sys.argv[1])]' "$samples"
echo
# The analyses take minutes more; run evaluate.py without the last flag for them.
"$PYTHON" "$ROOT/launch/evaluate.py" --workdir="$workdir" --out="$workdir/report" --analyses=False
echo "done in $(((SECONDS - begun) / 60)) min $(((SECONDS - begun) % 60)) s"
