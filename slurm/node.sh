#!/usr/bin/env bash
# One node's part of a job step, inside the container where there is one:
#
#   node.sh torchrun PROGRAM ARGUMENT...    the ranks of this node, one a GPU
#   node.sh python PROGRAM ARGUMENT...      one process
#
# The environment says the rest (see launch in lib.sh).
set -euo pipefail

# USR1 asks the ranks for a checkpoint. It reaches every process of a step: what has no handler for it must not die
# of it, and an ignored signal stays ignored across exec.
trap "" USR1
# A file a node, written here: srun's own %N is the host's name, which need not be the node's.
if [[ -n "${TOKEDIT_STEP:-}" ]]; then
    exec >>"$TOKEDIT_LOG_DIR/$TOKEDIT_STEP-$SLURMD_NODENAME.log" 2>&1
fi
# A site's own lines need not be written for -eu, and what they print is not the program's.
set +eu
# shellcheck source=slurm/env.sh
source "$TOKEDIT_ROOT/slurm/env.sh" >&2
tokedit_environment >&2
set -eu

launcher="$1"
shift
case "$launcher" in
    torchrun)
        # ranks that stopped in order leave a note in the run folder, and no failure for torchrun to explain at length
        export TOKEDIT_EXIT_CODE_OF_STOP=0
        # how long they may take to save after TERM; before torch 2.12 torchrun gives them 30 s, whatever is asked for
        export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TOKEDIT_SHUTDOWN_TIMEOUT:-280}"
        exec torchrun --nnodes="$TOKEDIT_EXPECTED_NODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$RANKS_PER_NODE" \
            --master-addr="$TOKEDIT_HEAD_ADDRESS" --master-port="$TOKEDIT_PORT" \
            --rdzv-conf="timeout=${TOKEDIT_JOIN_TIMEOUT:-300}" "$@"
        ;;
    python) exec python "$@" ;;
    *)
        echo "node.sh: $launcher is neither torchrun nor python" >&2
        exit 2
        ;;
esac
