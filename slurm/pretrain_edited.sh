#!/usr/bin/env bash
# Raw text -> edited dataset -> trained model, from one YAML file:
#
#   sbatch [--nodes N --gpus-per-node G ...] slurm/pretrain_edited.sh RUN.yaml [section.field=value ...]
#
# Step 1 makes the datasets of the sources that name raw `input` and are not there yet; step 2 trains. Both resume:
# submitting the same line again continues where the last job stopped. Before the time limit the job is told
# (USR1), saves a checkpoint and puts itself back into the queue, until the run is complete.
#SBATCH --job-name=pretrain_edited
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail

if (($# < 1)) || [[ "$1" != *.y*ml ]]; then
    echo "usage: sbatch slurm/pretrain_edited.sh RUN.yaml [section.field=value ...]" >&2
    exit 2
fi
# sbatch runs a copy of this file from its spool folder, so the project is found from where sbatch was called.
export TOKEDIT_ROOT="${TOKEDIT_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}"
if [[ ! -f "$TOKEDIT_ROOT/slurm/env.sh" ]]; then
    echo "slurm/env.sh is not below $TOKEDIT_ROOT: submit from the project's folder or set TOKEDIT_ROOT" >&2
    exit 1
fi
cd "$TOKEDIT_ROOT"
source slurm/env.sh

nodes="${SLURM_JOB_NUM_NODES:-1}"
read -r head_node < <(scontrol show hostnames "${SLURM_JOB_NODELIST:?not inside a Slurm job}")
# the address Slurm itself uses for the node, which need not be its name; resolved here, outside any container
head_address="$(scontrol show node "$head_node" --oneliner | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"
head_address="${head_address:-$head_node}"
port=$((20000 + SLURM_JOB_ID % 20000))
echo "job $SLURM_JOB_ID restart ${SLURM_RESTART_COUNT:-0}: $nodes node(s) x $RANKS_PER_NODE rank(s), head $head_node ($head_address:$port)"

# One task a node; torchrun starts the node's ranks. USR1 is ignored by everything but the training ranks, which
# install a handler of their own (an ignored signal stays ignored across exec).
step=
# shellcheck disable=SC2016
launch() {
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 --export=ALL \
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "${TOKEDIT_SRUN_ARGS[@]}" \
        bash -c 'trap "" USR1; source "$TOKEDIT_ROOT/slurm/env.sh"; head="$1"; port="$2"; nodes="$3"; shift 3
            exec torchrun --shutdown-timeout=280 --nnodes="$nodes" --node-rank="$SLURM_NODEID" --nproc-per-node="$RANKS_PER_NODE" \
                --master-addr="$head" --master-port="$port" tools/train.py "$@"' \
        launch "$head_address" "$port" "$nodes" "$@" &
    step=$!
    local status=0
    # a trapped signal ends `wait` early: wait again until the step itself is over
    while :; do
        wait "$step" && status=0 || status=$?
        kill -0 "$step" 2>/dev/null || break
    done
    return "$status"
}

stage=prepare
interrupted=0
# Finished work units outlive a killed preparation; training is asked for a checkpoint first.
on_usr1() {
    interrupted=1
    if [[ "$stage" == prepare ]]; then
        echo "USR1: ending the preparation; finished work units stay"
        kill -TERM "$step"
    else
        echo "USR1: asking the ranks for a checkpoint"
        scancel --signal=USR1 "$SLURM_JOB_ID"
    fi
}
trap on_usr1 USR1

requeue_if_interrupted() {
    ((interrupted)) || return 0
    local marker=".tokedit-requeue-$SLURM_JOB_ID" progress
    progress="$(python tools/train.py --config "$@" --progress 2>&1)" || true
    if [[ -f "$marker" && "$(cat "$marker")" == "$progress" ]]; then
        echo "no progress since the last requeue ($progress): not requeued; mend the cause and submit again" >&2
        exit 1
    fi
    printf '%s' "$progress" >"$marker"
    echo "requeue: $progress"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}

# Training ended itself before the job's time was over (runtime.exit_after_minutes), or was told to by others.
wants_requeue() {
    [[ "$(python tools/train.py --config "$@" --progress 2>/dev/null)" == *"to be continued" ]]
}

for stage in prepare train; do
    status=0
    if [[ "$stage" == prepare ]]; then
        launch --config "$@" --prepare || status=$?
    else
        launch --config "$@" || status=$?
        if ((status)) && wants_requeue "$@"; then interrupted=1; fi
    fi
    requeue_if_interrupted "$@"
    ((status == 0)) || exit "$status"
done
rm -f ".tokedit-requeue-$SLURM_JOB_ID"
