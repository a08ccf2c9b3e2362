# shellcheck shell=bash disable=SC2034
# The one file a site edits; every script in slurm/ sources it, on the batch host and inside each job step.
# Partition, account and the like go on the sbatch command line or into SBATCH_* variables, which sbatch reads itself:
#   export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=my_account

# --- environment: modules, then the virtual environment that `make install` made (or your own) ---------------
# module load cuda/13.0 nccl
TOKEDIT_VENV="${TOKEDIT_VENV:-$TOKEDIT_ROOT/.venv}"
if [[ -f "$TOKEDIT_VENV/bin/activate" ]]; then
    # shellcheck disable=SC1091
    source "$TOKEDIT_VENV/bin/activate"
fi

# --- ranks a node: GPUs of the node; without a GPU one rank, or as many as you say ---------------------------
export RANKS_PER_NODE="${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"

# --- container (pyxis/enroot); empty: none -------------------------------------------------------------------
TOKEDIT_SRUN_ARGS=(${TOKEDIT_CONTAINER:+--container-image="$TOKEDIT_CONTAINER"}
    ${TOKEDIT_CONTAINER_MOUNTS:+--container-mounts="$TOKEDIT_CONTAINER_MOUNTS"})

# --- network -------------------------------------------------------------------------------------------------
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((${SLURM_CPUS_ON_NODE:-1} / RANKS_PER_NODE > 0 ? ${SLURM_CPUS_ON_NODE:-1} / RANKS_PER_NODE : 1))}"
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"  # megatron-core's overlap under TP counts on it
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1  # a dead peer ends the job instead of hanging it
