# shellcheck shell=bash disable=SC2034
# The one file a site edits. Three parts, read at three places; a variable that is set already is left as it is.

# --- 1. the queue: read by sbatch, on the login node ----------------------------------------------------------
# tools/submit.py sources this file; for sbatch by hand `source slurm/env.sh` first, or give the flags to sbatch.
# What a RUN.yaml says in its `slurm:` section goes before this.
# export SBATCH_PARTITION="${SBATCH_PARTITION:-gpu}" SBATCH_ACCOUNT="${SBATCH_ACCOUNT:-my_account}"

# --- 2. the container: read by the job's script; empty: none --------------------------------------------------
# A .sif file is run by Apptainer (TOKEDIT_APPTAINER=singularity where that is its name), anything else (REGISTRY#NAME:TAG, a
# .sqsh file) by pyxis/enroot. The project and the folder the job was submitted from are mounted under their own names; name
# what lies elsewhere (runs, data, priors, tokenizers) as /data:/data,/scratch/me:/scratch/me.
export TOKEDIT_CONTAINER="${TOKEDIT_CONTAINER:-}"
export TOKEDIT_CONTAINER_MOUNTS="${TOKEDIT_CONTAINER_MOUNTS:-}"

# --- 3. the environment: on every node, inside the container where there is one -------------------------------
tokedit_environment() {
    # module load cuda/13.0 nccl
    # the virtual environment that `make install` made, or your own; a container brings its packages along
    local venv="${TOKEDIT_VENV:-}"
    [[ -n "$venv" || -n "$TOKEDIT_CONTAINER" ]] || venv="$TOKEDIT_ROOT/.venv"
    if [[ -f "$venv/bin/activate" ]]; then
        # shellcheck disable=SC1091
        source "$venv/bin/activate"
    fi
    export PYTHONPATH="$TOKEDIT_ROOT${PYTHONPATH:+:$PYTHONPATH}"  # this checkout, installed or not

    # network: see docs/slurm.md; which interface, which InfiniBand cards
    # export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5

    # a dead peer ends the job: an operation that waits for one longer than parallel.distributed_timeout_minutes is
    # aborted, and so is a process whose watchdog is stuck for as many seconds
    export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
    export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC="${TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC:-600}"
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"  # megatron-core's overlap under TP counts on it
    local threads=$((${SLURM_CPUS_ON_NODE:-1} / ${RANKS_PER_NODE:-1}))
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
}
