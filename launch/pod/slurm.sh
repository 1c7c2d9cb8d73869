#!/usr/bin/env bash
# Trains as a SLURM job. Run it on a login node, from a checkout that all nodes share and whose .venv is
# set up.
#
#   bash launch/pod/slurm.sh --nodes=4 --gpus=8 --time=24:00:00 -- --config=configs/large.py --workdir=/shared/run --stage=all
#
#   --nodes       number of nodes; default 1.
#   --gpus        GPUs per node; default 0. One process runs per GPU, or per node without GPUs, because
#                 that is how JAX assigns the devices of a SLURM job.
#   --time        time limit of the job each time it runs; default: the partition's limit.
#   --partition, --account, --name   as for sbatch; the default name is diladiff.
#   --cpus        CPUs per process; default: the partition's.
#   --grace       seconds before the time limit at which the job saves a checkpoint and exits; default 120.
#   --log         log file; default slurm-%j.log in the current folder.
#   --sbatch      another option of sbatch, for example --sbatch=--mem=0; may be repeated.
#   --dry-run     prints the command without running it.
#
# A job that exits with 75 (stopped by its time limit or by preemption, checkpoint saved) is queued again
# and resumes. SLURM itself queues it again when a node fails. Any other exit code ends it.
# `scancel --signal=TERM JOB` makes it save and queue again; `scancel JOB` ends it.
set -euo pipefail

# This part is the batch script. SLURM runs a copy of this file, so it cannot source its neighbours.
# A task that exits must not kill the others while they save (--kill-on-bad-exit=0), and waiting ten
# minutes for them lets SLURM notice a lost node first.
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
while (($#)); do # --sbatch may be repeated; common.sh parses the other options
  case "$1" in
    --sbatch=--?*) more+=("${1#*=}") ;;
    --sbatch | --sbatch=*) refuse "--sbatch: got '$1', expected --sbatch=--OPTION=VALUE" ;;
    --) words+=("$@"); break ;;
    *) words+=("$1") ;;
  esac
  shift
done
parse "nodes gpus time partition account name cpus grace log" "" "${words[@]}"

need nodes '[1-9][0-9]*' "a number of nodes above 0"
need gpus '[0-9]+' "a number of GPUs per node"
need grace '[1-9][0-9]*' "a number of seconds above 0"
[[ -z "$cpus" ]] || need cpus '[1-9][0-9]*' "a number of CPUs per process above 0"
[[ -z "$time" ]] || need time '[0-9]+(-[0-9]+)?(:[0-9]+){0,2}' "a time, for example 24:00:00 or 2-12"
check_arguments /shared
"$dry_run" || [[ -n "$(type -P sbatch)" ]] || refuse "sbatch is not installed. Run this on a login node of a SLURM cluster."
"$dry_run" || [[ -x "$ROOT/.venv/bin/python" ]] || refuse "$ROOT/.venv is not set up. Run: source launch/environment.sh; setup_environment"

# --open-mode=append continues the log of a job that was queued again. --signal without B: signals the
# training processes, not this script.
flags=(--job-name="$name" --nodes="$nodes" --ntasks-per-node="$((gpus ? gpus : 1))" --chdir="$ROOT" --output="$log")
flags+=(--open-mode=append --requeue --signal="TERM@$grace")
if ((gpus)); then flags+=(--gpus-per-node="$gpus"); fi
for option in "cpus-per-task=$cpus" "time=$time" "partition=$partition" "account=$account"; do
  [[ "$option" == *= ]] || flags+=("--$option")
done
execute sbatch "${flags[@]}" ${more[@]+"${more[@]}"} "$ROOT/launch/pod/slurm.sh" inside-job "${arguments[@]}"
