#!/usr/bin/env bash
# N processes on this machine, joined over the loopback: the smallest multi-host run there is.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

USAGE="$PROGRAM --processes N --config FILE.py --workdir DIR [options] [--config.a.b=VALUE ...]

Runs N processes on this machine, on CPUs unless JAX_PLATFORMS says otherwise (one process drives all GPUs of a machine by
itself). When one process fails the others are stopped.
  --processes N            default 2
  --port PORT              of the coordinator; default \$PORT, else the first free one from 12355 on"
OPTIONS=([processes]=2 [port]="${PORT:-}")
parse "$@"

need_number processes
need_config
need_workdir
need_tool dccot 'activate the environment that dccot_jax is installed in'
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

port=${OPTIONS[port]:-12355}
[[ $port =~ ^[1-9][0-9]{0,4}$ ]] || fail "--port=$port must be a port number"
if [[ -z ${OPTIONS[port]} && -z $DRY_RUN ]]; then
  while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
fi

pids=()
stop() { kill "${pids[@]}" 2>/dev/null || true; }
trap 'stop; wait; exit 130' INT
trap 'stop; wait; exit 143' TERM
for ((index = 0; index < OPTIONS[processes]; index++)); do
  dccot_words "--coordinator=127.0.0.1:$port" "--num_processes=${OPTIONS[processes]}" "--process_id=$index"
  if [[ -n $DRY_RUN ]]; then
    run dccot "${WORDS[@]}"
  else
    dccot "${WORDS[@]}" &
    pids+=($!)
  fi
done

status=0
for ((left = ${#pids[@]}; left > 0; left--)); do
  wait -n || {
    status=$?
    break
  }
done
if ((status)); then
  # The others would wait minutes for the one that is gone, but may be about to say what they think of it.
  for ((tenths = 0; tenths < 50; tenths++)); do
    kill -0 "${pids[@]}" 2>/dev/null || break
    sleep 0.1
  done
  stop
  wait
fi
exit "$status"
