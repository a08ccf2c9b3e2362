#!/usr/bin/env bash
# Raw text -> edited datasets -> trained model, from one YAML file:
#
#   sbatch [--nodes N --gpus-per-node G --cpus-per-task C --mem 0 --time T ...] slurm/pretrain_edited.sh RUN.yaml [section.field=value ...]
#
# Makes the datasets of the sources that name raw `input` and are not there yet, then trains. Submitting the same line
# again goes on where the last job stopped. Before the time limit the job is told (USR1), saves a checkpoint and puts
# itself back into the queue, until the run is complete. docs/slurm.md says what each line of the log means.
#SBATCH --job-name=pretrain_edited
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
    sed -nE '1s|.* Command=(.*)pretrain_edited\.sh.* WorkDir=.*|\1./..|p')"; } >/dev/null && pwd)}" || true
[[ -f "$TOKEDIT_ROOT/slurm/lib.sh" ]] || { echo "the project is not found in ${TOKEDIT_ROOT:-/}: submit a script of its slurm/ folder, or set TOKEDIT_ROOT" >&2; exit 1; }
# shellcheck source=slurm/lib.sh
source "$TOKEDIT_ROOT/slurm/lib.sh"

usage "sbatch slurm/pretrain_edited.sh RUN.yaml [section.field=value ...]" "$@"
train pretrain "$@"
