#!/usr/bin/env bash
# Supervised fine-tuning: a run of `stage: sft`, which teaches the weights of another run's checkpoint to answer:
#
#   sbatch [--nodes N --gpus-per-node G --cpus-per-task C --mem 0 --time T ...] slurm/sft.sh RUN.yaml [section.field=value ...]
#
# As slurm/pretrain_edited.sh; refuses a run of another stage, or whose `init_from` is not there, before anything
# else. To go on with a run that was interrupted, submit its own line again.
#SBATCH --job-name=sft
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail
trap told_early=1 USR1     # until lib.sh answers it: it must not end the job
# sbatch runs a copy of this file: where the project is, Slurm knows; a relative path starts where sbatch was called
TOKEDIT_ROOT="${TOKEDIT_ROOT:-$({ cd "${SLURM_SUBMIT_DIR:-.}"; cd "$(scontrol show job "${SLURM_JOB_ID:?start it with sbatch}" --oneliner |
    sed -nE '1s|.* Command=(.*)sft\.sh.* WorkDir=.*|\1./..|p')"; } >/dev/null && pwd)}" || true
[[ -f "$TOKEDIT_ROOT/slurm/lib.sh" ]] || { echo "the project is not found in ${TOKEDIT_ROOT:-/}: submit a script of its slurm/ folder, or set TOKEDIT_ROOT" >&2; exit 1; }
# shellcheck source=slurm/lib.sh
source "$TOKEDIT_ROOT/slurm/lib.sh"

usage "sbatch slurm/sft.sh RUN.yaml [section.field=value ...]" "$@"
train sft "$@"
