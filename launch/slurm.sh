#!/usr/bin/env bash
# One JAX process per GPU on a Slurm cluster; JAX reads the cluster's variables. Every node must see WORKDIR.
#   sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sh configs/smollm2_svamp.py /shared/runs/smollm2 [--config.a.b=value ...]
#SBATCH --job-name=dccot
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
set -euo pipefail
CONFIG=$1 WORKDIR=$2
shift 2
srun --kill-on-bad-exit=1 dccot run --distributed --config="$CONFIG" --workdir="$WORKDIR" "$@"
