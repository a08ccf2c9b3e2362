#!/usr/bin/env bash
# The datasets of a run, edited by many independent jobs:
#
#   sbatch --array=0-15 [--gpus-per-node G ...] slurm/preprocess_edit.sh RUN.yaml [section.field=value ...]
#   sbatch --dependency=afterok:JOB slurm/preprocess_edit.sh --merge RUN.yaml [section.field=value ...]
#
# Each array task does its share of the work units of all sources that are missing. Tasks that failed: submit the first
# line again, shares that are done end at once. The merge refuses while units are missing. Without --array one job does
# both. tools/submit.py submits the chain, and on a second time only the tasks that have something left to do.
#SBATCH --job-name=preprocess_edit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail
trap told_early=1 USR1     # until lib.sh answers it: it must not end the job
# sbatch runs a copy of this file: where the project is, Slurm knows; a relative path starts where sbatch was called
TOKEDIT_ROOT="${TOKEDIT_ROOT:-$({ cd "${SLURM_SUBMIT_DIR:-.}"; cd "$(scontrol show job "${SLURM_JOB_ID:?start it with sbatch}" --oneliner |
    sed -nE '1s|.* Command=(.*)preprocess_edit\.sh.* WorkDir=.*|\1./..|p')"; } >/dev/null && pwd)}" || true
[[ -f "$TOKEDIT_ROOT/slurm/lib.sh" ]] || { echo "the project is not found in ${TOKEDIT_ROOT:-/}: submit a script of its slurm/ folder, or set TOKEDIT_ROOT" >&2; exit 1; }
# shellcheck source=slurm/lib.sh
source "$TOKEDIT_ROOT/slurm/lib.sh"

work=all
if [[ "${1:-}" == --merge ]]; then
    work=merge
    shift
elif [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then
    work=edit
fi
usage "sbatch [--array=0-N] slurm/preprocess_edit.sh [--merge] RUN.yaml [section.field=value ...]" "$@"
if [[ "$work" == merge ]]; then
    begin merge "$@"
    check_nodes
    run_step merge python "$TOKEDIT_ROOT/tools/train.py" --config "$@" --prepare --stage merge
else
    begin preprocess "$@"
    check_nodes
    run_step prepare torchrun "$TOKEDIT_ROOT/tools/train.py" --config "$@" --prepare --stage "$work"
fi
finish
