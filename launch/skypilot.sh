#!/usr/bin/env bash
# A SkyPilot task: a TPU slice, or nodes with GPUs (one process per node, which drives all of them), on any cloud it knows.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

USAGE="$PROGRAM --accelerators NAME[:N] --config FILE.py --workdir DIR [options] [--config.a.b=VALUE ...] [-- SKY_OPTION ...]

Makes a SkyPilot task of this checkout and launches it; --dry-run prints the YAML. The cluster takes itself down after ten idle
minutes. With --spot it is a managed job, which SkyPilot starts again after a preemption and which then goes on where it stopped.
  --accelerators NAME[:N]  per node, such as H100:8 or tpu-v5litepod-16 (see sky show-gpus); default \$ACCELERATORS
  --nodes N                default 1; a TPU slice is one node, whatever its hosts
  --infra CLOUD[/REGION]   default \$INFRA, else SkyPilot's choice
  --runtime-version VER    of a TPU VM; default \$RUNTIME_VERSION, else SkyPilot's
  --name NAME              of the cluster or job; default dccot
  --spot                   capacity that can be preempted
Options after -- go to sky launch, or to sky jobs launch (--retry-until-up, --env NAME)."
OPTIONS=([accelerators]="${ACCELERATORS:-}" [nodes]=1 [infra]="${INFRA:-}" [runtime-version]="${RUNTIME_VERSION:-}" [name]=dccot)
SWITCHES=([spot]='')
parse "$@"

need_name
need accelerators ACCELERATORS
need_number nodes
need_config_in_checkout
need_shared_workdir
need_tool sky 'install it with pip install skypilot[gcp] (or your cloud)'

if [[ ${OPTIONS[accelerators]} == tpu-* ]]; then
  # Each slice would be a run of its own, all in one workdir.
  ((OPTIONS[nodes] == 1)) || fail "--nodes=${OPTIONS[nodes]}: SkyPilot does not join TPU slices; launch/tpu_pod.sh --num-slices does"
  extra=tpu
  dccot_words --distributed
  processes=''
else
  extra=cuda
  dccot_words
  # shellcheck disable=SC2016  # expanded on the nodes
  processes=' --coordinator="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):12355" --num_processes="$SKYPILOT_NUM_NODES" --process_id="$SKYPILOT_NODE_RANK"'
fi

task="name: ${OPTIONS[name]}
num_nodes: ${OPTIONS[nodes]}
workdir: $(json "$ROOT")
resources:
  accelerators: $(json "${OPTIONS[accelerators]}")"
[[ -z ${OPTIONS[infra]} ]] || task+="
  infra: $(json "${OPTIONS[infra]}")"
[[ -z ${OPTIONS[runtime-version]} ]] || task+="
  accelerator_args:
    runtime_version: $(json "${OPTIONS[runtime-version]}")"
[[ -z ${SWITCHES[spot]} ]] || task+="
  use_spot: true"
task+="
setup: |
  set -e
  $(setup_command "$extra")
run: |
  .venv/bin/dccot $(quoted "${WORDS[@]}")$processes"

if [[ -n ${SWITCHES[spot]} ]]; then
  launch=(sky jobs launch --yes "--name=${OPTIONS[name]}")
else
  launch=(sky launch --yes "--cluster=${OPTIONS[name]}" --idle-minutes-to-autostop=10 --down)
fi
if [[ -n $DRY_RUN ]]; then
  printf '%s\n' "# $(quoted "${launch[@]}" "${EXTRA[@]}") dccot.yaml" "$task"
  exit
fi
folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
printf '%s\n' "$task" >"$folder/dccot.yaml"
"${launch[@]}" "${EXTRA[@]}" "$folder/dccot.yaml"
