#!/usr/bin/env bash
# Trains all four stages at tiny size on two CPU cores, prints samples, and measures the paper's claim.
#
#   bash launch/quickstart.sh [WORKDIR] [--corpus=stories|pydocs|FOLDER] [--config=FILE]
#
#   WORKDIR    where everything goes; default runs/CORPUS. A stopped run goes on with the same command.
#   --corpus   stories (default, 5 minutes on two idle cores, 14 on busy ones): a grammar with exact oracles; pydocs: the
#              documentation of this Python; or a folder, glob or file of your own text.
#   --config   an experiment file; default configs/tiny.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() { sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
refuse() { echo "error: $1" >&2; exit 2; }

workdir="" corpus="" config=""
while (($#)); do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --corpus=*) corpus="${1#*=}" ;;
    --config=*) config="${1#*=}" ;;
    --corpus | --config) (($# > 1)) || refuse "$1 needs a value: $1=VALUE"; printf -v "${1#--}" '%s' "$2"; shift ;;
    -*) refuse "$1 is not an option; there are --corpus and --config (see --help)" ;;
    *) [[ -z "$workdir" ]] || refuse "two working folders given, $workdir and $1"; workdir="$1" ;;
  esac
  shift
done
if [[ -n "$corpus" && "$corpus" != stories && "$corpus" != pydocs ]]; then
  compgen -G "$corpus" > /dev/null || refuse "--corpus=$corpus: no such folder or file; give stories, pydocs, or text of your own"
  [[ -e "$corpus" ]] && corpus="$(cd "$(dirname "$corpus")" && pwd)/$(basename "$corpus")"
fi
if [[ -z "$workdir" ]]; then
  name="${corpus:-${config:+$(basename "$config" .py)}}"
  workdir="$ROOT/runs/$(basename "${name:-stories}")"
fi
config="${config:-$ROOT/configs/tiny.py}"
[[ -f "${config%%:*}" ]] || refuse "--config=$config: no such file"
config="$config${corpus:+:$corpus}"

setup_environment || exit 1
begun=$SECONDS
"$PYTHON" "$ROOT/launch/train.py" --config="$config" --workdir="$workdir" --stage=all
echo
echo "samples:"
"$PYTHON" "$ROOT/launch/sample.py" --workdir="$workdir" --num=8 --out="$workdir/samples/quickstart.jsonl"
"$PYTHON" -c 'import json, sys; [print("  |", json.loads(line)["text"].replace("\n", "\n  |   ")) for line in open(sys.argv[1])]' "$workdir/samples/quickstart.jsonl"
echo
# Without the analyses, which take minutes more; evaluate.py without this flag makes them.
"$PYTHON" "$ROOT/launch/evaluate.py" --workdir="$workdir" --out="$workdir/report" --analyses=False
echo "done in $(((SECONDS - begun) / 60)) min $(((SECONDS - begun) % 60)) s"
