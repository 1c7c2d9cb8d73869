#!/usr/bin/env bash
# Trains as a SLURM job; run on a login node, from a checkout that every node sees and whose .venv is set up.
#
#   bash launch/pod/slurm.sh --nodes=4 --gpus=8 --time=24:00:00 -- --config=configs/large.py --workdir=/shared/run --stage=all
#
#   --nodes       default 1.
#   --gpus        on each node, default 0. One process a GPU (one a node without): so JAX divides a SLURM job's devices.
#   --time        limit of one stretch; default: the partition's.
#   --partition, --account, --name   as sbatch's; the name is diladiff by default.
#   --cpus        for each process; default: the partition's.
#   --grace       seconds before the time limit at which the job is told to save and end; default 120.
#   --log         default slurm-%j.log, in the folder of this call.
#   --sbatch      one more option of sbatch, e.g. --sbatch=--mem=0; may be repeated.
#   --dry-run     prints the command, and runs none.
#
# A job that ends with 75 (told to end by its time limit or by a preemption, checkpoint saved) is queued again and goes on;
# SLURM itself queues it again when a node fails. Any other exit code ends it. `scancel --signal=TERM JOB` makes it save and
# queue again, `scancel JOB` ends it.
set -euo pipefail

# What the batch script itself does. SLURM runs a copy of this file in the checkout (--chdir), so nothing is sourced here.
# A task that ends must not take the others with it while they save; and ten minutes let SLURM notice a lost node first.
if [[ "${1:-}" == inside-job ]]; then
  shift
  code=0
  srun --kill-on-bad-exit=0 --wait=600 --gpu-bind=none .venv/bin/python launch/train.py --distributed=auto "$@" || code=$?
  echo "training ended with exit code $code on $(date)"
  if ((code == 75)); then scontrol requeue "${SLURM_JOB_ID:?}"; fi
  exit "$code"
fi

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
nodes=1 gpus=0 time="" partition="" account="" name=diladiff cpus="" grace=120 log="$PWD/slurm-%j.log"
more=() words=()
while (($#)); do # --sbatch may be repeated, the others are parsed as everywhere
  case "$1" in
    --sbatch=--?*) more+=("${1#*=}") ;;
    --sbatch | --sbatch=*) refuse "$1 is no option of sbatch; write --sbatch=--OPTION=VALUE" ;;
    --) words+=("$@"); break ;;
    *) words+=("$1") ;;
  esac
  shift
done
parse "nodes gpus time partition account name cpus grace log" "" "${words[@]}"

need nodes '[1-9][0-9]*' "a number of nodes"
need gpus '[0-9]+' "a number of GPUs on each node"
need grace '[1-9][0-9]*' "a number of seconds"
[[ -z "$cpus" ]] || need cpus '[1-9][0-9]*' "a number of CPUs for each process"
[[ -z "$time" ]] || need time '[0-9]+(-[0-9]+)?(:[0-9]+){0,2}' "a time such as 24:00:00 or 2-12"
check_arguments /shared
"$dry_run" || [[ -n "$(type -P sbatch)" ]] || refuse "sbatch is not here; this is for a login node of a SLURM cluster"
"$dry_run" || [[ -x "$ROOT/.venv/bin/python" ]] || refuse "$ROOT/.venv is not set up; see docs/pods.md"

# --open-mode=append: the log of a job that was queued again goes on. --signal without B: reaches the processes, not this script.
flags=(--job-name="$name" --nodes="$nodes" --ntasks-per-node="$((gpus ? gpus : 1))" --chdir="$ROOT" --output="$log")
flags+=(--open-mode=append --requeue --signal="TERM@$grace")
if ((gpus)); then flags+=(--gpus-per-node="$gpus"); fi
for option in "cpus-per-task=$cpus" "time=$time" "partition=$partition" "account=$account"; do
  [[ "$option" == *= ]] || flags+=("--$option")
done
execute sbatch "${flags[@]}" ${more[@]+"${more[@]}"} "$ROOT/launch/pod/slurm.sh" inside-job "${arguments[@]}"
