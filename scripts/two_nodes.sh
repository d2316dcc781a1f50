#!/usr/bin/env bash
# Two nodes of 8 GPUs under SLURM:
#     sbatch scripts/two_nodes.sh config/train_gpt2_cpr.py --out_dir=/shared/out \
#         --batch_size=10 --gradient_accumulation_steps=48
# These are as many tokens an iteration as the config's; 16, the number of processes, divides 48.
# Without SLURM run the `export` lines, then torchrun and what follows it, on each node, with the first
# node's name for HEAD and any number for SLURM_JOB_ID. Both nodes must see out_dir and data/.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
set -euo pipefail

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# torchrun's store outlives the processes: after a restart they would take their predecessors' addresses from it
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# how long the last iteration and its checkpoint may take after the signal, before torchrun kills
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
export OMP_NUM_THREADS=8

srun --cpus-per-task="$SLURM_CPUS_PER_TASK" torchrun --nnodes=2 --nproc_per_node=8 --max-restarts=10 \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$HEAD:29500" \
    train.py "$@" --init_from=auto
