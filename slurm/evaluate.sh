#!/usr/bin/env bash
# Perplexity of a run's newest checkpoint on its validation sources, by domain:
#
#   sbatch [--gpus-per-node 1 ...] slurm/evaluate.sh RUN.yaml [section.field=value ...]
#
# Prints a table, writes RUN_DIR/evaluation/ and enters the numbers into the run's TensorBoard.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail
trap told_early=1 USR1     # until lib.sh answers it: it must not end the job
# sbatch runs a copy of this file: where the project is, Slurm knows; a relative path starts where sbatch was called
TOKEDIT_ROOT="${TOKEDIT_ROOT:-$({ cd "${SLURM_SUBMIT_DIR:-.}"; cd "$(scontrol show job "${SLURM_JOB_ID:?start it with sbatch}" --oneliner |
    sed -nE '1s|.* Command=(.*)evaluate\.sh.* WorkDir=.*|\1./..|p')"; } >/dev/null && pwd)}" || true
[[ -f "$TOKEDIT_ROOT/slurm/lib.sh" ]] || { echo "the project is not found in ${TOKEDIT_ROOT:-/}: submit a script of its slurm/ folder, or set TOKEDIT_ROOT" >&2; exit 1; }
# shellcheck source=slurm/lib.sh
source "$TOKEDIT_ROOT/slurm/lib.sh"

usage "sbatch slurm/evaluate.sh RUN.yaml [section.field=value ...]" "$@"
begin evaluate "$@"
check_nodes
run_step evaluate python "$TOKEDIT_ROOT/tools/evaluate.py" perplexity --config "$@"
finish
