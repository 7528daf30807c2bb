#!/usr/bin/env bash
# One JAX process per GPU on a Slurm cluster. JAX reads Slurm's variables; process i of a node takes GPU i.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

USAGE="$PROGRAM --nodes N --gpus N --config FILE.py --workdir DIR [options] [--config.a.b=VALUE ...] [-- SBATCH_OPTION ...]

Run on a login node, in the activated environment (sbatch hands it on): submits a batch job. A job that Slurm requeues goes on
where it stopped; a second job of the same name waits for the first. Partition, account and time limit: sbatch's own
SBATCH_PARTITION, SBATCH_ACCOUNT and SBATCH_TIMELIMIT, or options after --.
  --nodes N                default 1
  --gpus N                 GPUs, and processes, per node; default 8
  --name NAME              of the job; default dccot"
OPTIONS=([nodes]=1 [gpus]=8 [name]=dccot)
parse "$@"

need_number nodes
need_number gpus
need_name
need_config
need_shared_workdir
need_tool sbatch 'run this on a login node of the cluster'
need_tool dccot 'activate the environment that dccot_jax is installed in'

# No --gpus-per-task: JAX picks GPU number SLURM_LOCALID, so every process must see all GPUs of its node.
dccot_words --distributed
script="#!/usr/bin/env bash
exec srun --kill-on-bad-exit=1 --gpu-bind=none dccot $(quoted "${WORDS[@]}")"
submit=(sbatch "--job-name=${OPTIONS[name]}" "--nodes=${OPTIONS[nodes]}" "--ntasks-per-node=${OPTIONS[gpus]}"
  "--gpus-per-node=${OPTIONS[gpus]}" --dependency=singleton --requeue --open-mode=append "${EXTRA[@]}")
if [[ -n $DRY_RUN ]]; then
  printf '%s\n' "$(quoted "${submit[@]}") <<'SCRIPT'" "$script" SCRIPT
else
  "${submit[@]}" <<<"$script"
fi
