# shellcheck shell=bash
# What the scripts of this folder share. A script finds TOKEDIT_ROOT, sources this file and calls, in order: usage,
# begin, check_nodes, run_step (once a step), finish.
#
# A job's own lines begin with "slurm:". Everything of a step goes to RUN_DIR/slurm/JOB/restart-R/STEP-NODE.log, a file a
# node; the head node's is also shown in the job's log.

export TOKEDIT_ROOT
set +eu     # a site's own lines need not be written for them
# shellcheck source=slurm/env.sh
source "$TOKEDIT_ROOT/slurm/env.sh"
set -eu

say() { echo "slurm: $(date '+%F %T') $*"; }

fail() {
    say "$*" >&2
    exit 1
}

# usage TEXT COUNT ARGUMENT...: wrong usage ends here, before anything else is asked for.
usage() {
    local text="$1" config="${2:-}"
    if [[ "$config" != *.yaml && "$config" != *.yml ]]; then
        echo "usage: $text" >&2
        exit 2
    fi
    [[ -f "$config" ]] || fail "$config does not exist, seen from $PWD, the folder the job was submitted from"
}

# --- signals ------------------------------------------------------------------------------------------------------
step=             # process of the step's srun, while there is one
step_name=
interrupted=      # why the job has to end and be queued again
terminated=       # Slurm itself ends the job (scancel, scontrol requeue, the limit): it knows whether to queue it again

# Slurm's warning ahead of the time limit.
on_usr1() {
    [[ -z "$interrupted" ]] || return 0
    interrupted="told by USR1 (the time limit is near)"
    say "$interrupted"
    [[ -z "$step" ]] || ask_to_stop
}

# Training and the edit of texts are asked to save what they have, the other steps are ended; the asking is repeated,
# because a rank that has only just been started does not hear it yet.
ask_to_stop() {
    local signal=TERM
    [[ "$step_name" != train && "$step_name" != prepare ]] || signal=USR1
    say "asking $step_name to stop ($signal)"
    (while kill -0 "$step" 2>/dev/null; do
        scancel --signal="$signal" "$job" || true
        sleep 20
    done) >/dev/null 2>&1 &
}

on_term() {
    terminated=1
    say "told by TERM: Slurm ends this job (scancel, requeue or preemption); waiting for the step to end"
}

# --- the job ------------------------------------------------------------------------------------------------------
trap on_usr1 USR1
trap on_term TERM
[[ -z "${told_early:-}" ]] || on_usr1
# An array task is ARRAY_TASK: its plain number may stand for the whole array.
job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}"
job="${job:-${SLURM_JOB_ID:?not inside a Slurm job: start it with sbatch}}"
restart="${SLURM_RESTART_COUNT:-0}"
nodes="${SLURM_JOB_NUM_NODES:-1}"
export TOKEDIT_RANKS_ARE_ASKED_FOR="${RANKS_PER_NODE:+1}" RANKS_PER_NODE="${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
[[ "$RANKS_PER_NODE" =~ ^[1-9][0-9]*$ ]] || fail "RANKS_PER_NODE=$RANKS_PER_NODE: expected the number of ranks on a node"
export TOKEDIT_EXPECTED_NODES="$nodes" TOKEDIT_EXPECTED_WORLD_SIZE=$((nodes * RANKS_PER_NODE))

# The address Slurm itself uses for a node, which need not be its name; found here, outside any container.
mapfile -t node_names < <(scontrol show hostnames "${SLURM_JOB_NODELIST:?not inside a Slurm job}")
head_node="${node_names[0]}"
TOKEDIT_HEAD_ADDRESS="$(scontrol show node "$head_node" --oneliner | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"
export TOKEDIT_HEAD_ADDRESS="${TOKEDIT_HEAD_ADDRESS:-$head_node}"
# A port a step, so that one that is late to close is in nobody's way; below those that systems give out by themselves.
export TOKEDIT_PORT=$((20000 + SLURM_JOB_ID * 4 % 12000))

container=()      # of srun
inside=()         # in front of the command
mounts="$TOKEDIT_ROOT:$TOKEDIT_ROOT,$PWD:$PWD${TOKEDIT_CONTAINER_MOUNTS:+,$TOKEDIT_CONTAINER_MOUNTS}"
case "$TOKEDIT_CONTAINER" in
    "") ;;
    *.sif) inside=("${TOKEDIT_APPTAINER:-apptainer}" exec ${SLURM_GPUS_ON_NODE:+--nv} --bind "$mounts" --pwd "$PWD" "$TOKEDIT_CONTAINER") ;;
    *) container=(--container-image="$TOKEDIT_CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD") ;;
esac

# A step has all the CPUs and GPUs of the job on its nodes; but Slurm may bind its one task, and with it all ranks, to one
# core, unless it is told not to (and where it cannot bind, it warns of being told).
binding=(--cpu-bind=none)
if [[ "$(scontrol show config)" =~ TaskPlugin[[:space:]]*=[[:space:]]*(task/none|\(null) ]]; then binding=(); fi

# srun takes these as options of a step. They may be those of another job (sbatch called inside one), or contradict each other,
# which srun refuses; without them a step has all that its job has.
unset SLURM_CPUS_PER_TASK SLURM_TRES_PER_TASK SRUN_CPUS_PER_TASK SLURM_EXCLUSIVE SLURM_EXACT SLURM_HINT SLURM_THREADS_PER_CORE \
    SLURM_CPU_BIND SLURM_CPU_BIND_LIST SLURM_CPU_BIND_TYPE SLURM_CPU_BIND_VERBOSE

# launch NODES SRUN-OPTION... -- node.sh's arguments: one task a node.
launch() {
    local count="$1" options=()
    shift
    while [[ "$1" != -- ]]; do
        options+=("$1")
        shift
    done
    shift
    exec srun --nodes="$count" --ntasks="$count" --ntasks-per-node=1 --kill-on-bad-exit=1 --overlap --export=ALL \
        "${binding[@]}" "${options[@]}" "${container[@]}" "${inside[@]}" bash "$TOKEDIT_ROOT/slurm/node.sh" "$@"
}

# tool PROGRAM ARGUMENT...: a short Python program on the head node, where the packages are.
tool() { (TOKEDIT_STEP='' launch 1 --nodelist="$head_node" -- python "$TOKEDIT_ROOT/tools/$1" "${@:2}"); }

# What a tool printed without what a site's profile or a container's start printed before it.
assignments() { grep -E '^[a-z_]+=' <<<"$1" || true; }

# --- steps --------------------------------------------------------------------------------------------------------
# begin STAGE CONFIG [OVERRIDE...]: says where the run is; refuses a job that does not fit its configuration, and one that
# was started again twice without progress. Sets run_dir, log_dir, missing_sources, complete, progress, run_stage, gpu_type.
begin() {
    stage="$1"
    shift
    run=("$@")
    say "job $job restart $restart: $nodes node(s) x $RANKS_PER_NODE rank(s), head $head_node ($TOKEDIT_HEAD_ADDRESS)"
    run_dir='' log_dir='' progress='' run_stage='' gpu_type='' missing_sources=0 complete=0
    local found
    found="$(tool slurm_job.py begin "$stage" --config "${run[@]}")" || fail "job $job does not start: see above"
    eval "$(assignments "$found")"
    [[ -d "$log_dir" ]] || fail "$log_dir was made inside the container and is not there outside: name its file system in TOKEDIT_CONTAINER_MOUNTS"
    export TOKEDIT_LOG_DIR="$log_dir"
    say "$run_dir: $progress"
    say "logs: $log_dir"
}

# check_nodes: the job's nodes are alike, in time, can talk to each other, and have room; TOKEDIT_NODE_CHECK=0 leaves it out.
check_nodes() {
    [[ "${TOKEDIT_NODE_CHECK:-1}" != 0 ]] || return 0
    local names
    names="$(IFS=,; echo "${node_names[*]}")"
    run_step check python "$TOKEDIT_ROOT/tools/node_check.py" --nodes "$nodes" --node-names "$names" \
        --master-addr "$TOKEDIT_HEAD_ADDRESS" --master-port "$TOKEDIT_PORT" --path "$run_dir" \
        --join-timeout "${TOKEDIT_JOIN_TIMEOUT:-300}" \
        ${gpu_type:+--gpu-type "$gpu_type"} ${TOKEDIT_MIN_FREE_GB:+--min-free-gb "$TOKEDIT_MIN_FREE_GB"}
}

# run_step NAME torchrun|python PROGRAM ARGUMENT...: on all nodes; ends the job, or queues it again, where it does not succeed.
run_step() {
    step_name="$1"
    export TOKEDIT_STEP="$step_name"
    shift
    [[ -z "$terminated" ]] || exit 143
    requeue_if_interrupted
    local status=0 srun_log="$log_dir/$step_name-srun.log" head_log="$log_dir/$step_name-$head_node.log"
    say "step $step_name"
    : >"$srun_log"
    launch "$nodes" --job-name="$step_name" -- "$@" 2>"$srun_log" &
    step=$!
    [[ -z "$interrupted" ]] || ask_to_stop
    # scancel's TERM comes to the whole batch step, and what the ranks say of the checkpoint that they save then is to be seen
    (trap "" TERM USR1; exec tail -q -n +1 -s 0.5 -F --pid="$step" "$srun_log" "$head_log" 2>/dev/null) &
    local tail=$!
    # a trapped signal ends `wait` early, and with its own status: wait until the step itself is over, then ask for its status
    wait "$step" || true
    while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done
    wait "$step" && status=0 || status=$?
    wait "$tail" || true
    step=
    export TOKEDIT_PORT=$((TOKEDIT_PORT + 1))
    end_step "$status"
}

# A step that stopped in order leaves word of it, and the run goes on: queue the job again. One that failed names its
# nodes and shows their last lines.
end_step() {
    local status="$1" continue=0 killed=''
    if [[ -n "$terminated" ]]; then
        say "step $step_name ended as Slurm ends the job"
        exit 143
    fi
    # a node's process that died by itself: where others saved because of it, that is no order to go on
    killed="$(grep -m 1 -E '^srun: error: [^:]+: tasks? ' "$log_dir/$step_name-srun.log" 2>/dev/null | sed -nE '/: (Killed|Aborted|Segmentation|Bus|Floating|Illegal)/s/^srun: error: //p')" || true
    if [[ "$step_name" == train || "$step_name" == prepare ]]; then
        local found
        found="$(tool slurm_job.py end "$stage" --config "${run[@]}")" || ((status)) || fail "whether $step_name is to go on is not known: see above"
        eval "$(assignments "$found")"
        if ((continue)) && [[ -n "$killed" && -z "$interrupted" ]]; then
            say "$run_dir: $progress"
            continue=0
        fi
        if ((continue)); then
            interrupted="${interrupted:-$step_name stopped in order}"
            say "$run_dir: $progress"
        fi
    fi
    # a step that was asked to stop and was done before it heard leaves nothing to go on with but the next step
    ((status)) || ((continue)) || return 0
    requeue_if_interrupted
    local failed=() node reason
    mapfile -t failed < <(sed -nE 's/^srun: error: ([^:]+): tasks? .*: (Exited|Killed|Terminated|Aborted|Segmentation|Bus|Floating|Illegal).*/\1/p
        s/^srun: error: (Node failure on|Timed out waiting for.* on) ([^ ]+).*/\2/p' "$log_dir/$step_name-srun.log" 2>/dev/null)
    for node in "${failed[@]:0:3}"; do
        [[ "$node" != "$head_node" ]] || continue
        say "last lines of node $node ($log_dir/$step_name-$node.log):"
        tail -n 25 "$log_dir/$step_name-$node.log" 2>/dev/null | sed "s/^/  $node: /" || true
    done
    # what our programs, and torchrun of a rank that was killed, say in one line
    reason="$(grep -h -m 1 -E '^error: |Signal [0-9]+ \(' "$log_dir/$step_name-${failed[0]:-$head_node}.log" 2>/dev/null | sed -E 's/^ *(traceback *: )?//')" || true
    reason="${reason:-$killed}"
    [[ -d "$log_dir" ]] || reason="$log_dir was removed, or its file system is gone, while the job ran"
    say "step $step_name FAILED (exit code $status)${failed[*]:+, first on ${failed[0]}}${reason:+: $reason}; logs: $log_dir"
    exit "$status"
}

requeue_if_interrupted() {
    [[ -n "$interrupted" ]] || return 0
    # a job that its user has cancelled would be brought back to life
    local shown=''
    if [[ -z "$terminated" ]]; then
        shown="$(insist scontrol show job "$job" --oneliner)" ||
            fail "not queued again: Slurm does not say what becomes of this job; submit it again by hand, it goes on where it stopped"
    fi
    if [[ ! "$shown" =~ \ JobState=(RUNNING|SIGNALING)\  ]]; then
        say "not queued again from here: Slurm is ending this job"
        exit 143
    fi
    say "requeue: $interrupted"
    insist scontrol requeue "$job" || fail "cannot be queued again: submit it again by hand, it goes on where it stopped"
    exit 0
}

# insist COMMAND...: for a minute, in case Slurm's controller is busy or restarting.
insist() {
    local try
    for try in 1 2 3 4 5 6; do
        if "$@"; then return 0; fi
        ((try == 6)) || sleep 10
    done
    return 1
}

# finish: the job's last line.
finish() {
    say "done: $stage of ${run[0]}"
}

# train pretrain|continue|sft CONFIG [OVERRIDE...]: the datasets that are missing, then the training, until the run is complete.
train() {
    local wanted="$1"
    shift
    begin train "$@"
    if [[ "$wanted" != pretrain && "$run_stage" != "$wanted" ]]; then
        local -A scripts=([pretrain]=pretrain_edited.sh [continue]=continual_pretrain.sh [sft]=sft.sh)
        fail "${run[0]}: this script is for \`stage: $wanted\` with \`init_from\`, and the stage is $run_stage; use ${scripts[$run_stage]}"
    fi
    if ((complete)); then
        say "nothing to do: the run is complete"
        return
    fi
    check_nodes
    if ((missing_sources)); then
        run_step prepare torchrun "$TOKEDIT_ROOT/tools/train.py" --config "$@" --prepare
    fi
    run_step train torchrun "$TOKEDIT_ROOT/tools/train.py" --config "$@"
    finish
}
