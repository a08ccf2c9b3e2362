#!/usr/bin/env bash
# Continual pre-training: a run of `stage: continue`, which starts from the weights of another run's checkpoint:
#
#   sbatch [--nodes N --gpus-per-node G --cpus-per-task C --mem 0 --time T ...] slurm/continual_pretrain.sh RUN.yaml [section.field=value ...]
#
# As slurm/pretrain_edited.sh; refuses a run that starts from nothing, or whose `init_from` is not there, before
# anything else. To go on with a run that was interrupted, submit its own line again.
#SBATCH --job-name=continual_pretrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail
# sbatch runs a copy of this file: where the project is, Slurm knows
TOKEDIT_ROOT="${TOKEDIT_ROOT:-$(scontrol show job "${SLURM_JOB_ID:?start it with sbatch}" --oneliner | sed -nE '1s|.* Command=(/.*)/slurm/[a-z_]+\.sh.* WorkDir=.*|\1|p')}"
: "${TOKEDIT_ROOT:?the project is not found: submit a script of its slurm/ folder, or set TOKEDIT_ROOT}"
# shellcheck source=slurm/lib.sh
source "$TOKEDIT_ROOT/slurm/lib.sh"

usage "sbatch slurm/continual_pretrain.sh RUN.yaml [section.field=value ...]" "$@"
train continue "$@"
