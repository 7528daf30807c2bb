#!/usr/bin/env bash
# Two processes on this machine, joined over the loopback: the smallest multi-host run there is.
#   launch/two_processes.sh configs/quickstart.py runs/two [--config.a.b=value ...]
set -euo pipefail
CONFIG=$1 WORKDIR=$2
shift 2
PORT=${PORT:-12355}
pids=()
for index in 0 1; do
  dccot run --coordinator="127.0.0.1:$PORT" --num_processes=2 --process_id=$index --config="$CONFIG" --workdir="$WORKDIR" "$@" &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "$status"
