#!/usr/bin/env bash
# The same command on every worker of a Cloud TPU pod slice; JAX finds its peers. WORKDIR is a gs:// path or a shared disk.
#   NAME=my-slice ZONE=us-east5-a launch/tpu_pod.sh configs/smollm2_svamp.py WORKDIR [--config.a.b=value ...]
set -euo pipefail
CONFIG=$1 WORKDIR=$2
shift 2
gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all \
  --command="cd dccot_jax && .venv/bin/dccot run --distributed --config=$CONFIG --workdir=$WORKDIR $*"
