#!/usr/bin/env bash
# Cloud TPU slices through queued resources: asked for, waited for, set up, and the same command on every worker.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

USAGE="$PROGRAM --zone ZONE --accelerator-type TYPE --runtime-version VERSION --config FILE.py --workdir DIR [options]
    [--config.a.b=VALUE ...] [-- CREATE_OPTION ...]

Creates the queued resource if there is none, waits until it is active, copies this checkout to every worker, installs it and runs
there; JAX finds the other workers by itself. What was preempted is asked for again. The slices stay until you delete them.
  --name NAME              of the queued resource and its node (its nodes NAME-0, NAME-1, ...); default \$TPU_NAME, else dccot
  --zone ZONE              default \$ZONE
  --project PROJECT        default \$PROJECT, else gcloud's
  --accelerator-type TYPE  such as v5litepod-16; default \$ACCELERATOR_TYPE
  --num-slices N           slices of that type, joined by the mesh axis data (--config.mesh.data=N); default 1
  --runtime-version VER    such as v2-alpha-tpuv5-lite; default \$RUNTIME_VERSION
  --spot                   capacity that can be preempted
Options after -- go to gcloud compute tpus queued-resources create (--reserved, --network=..., --service-account=...)."
OPTIONS=([name]="${TPU_NAME:-dccot}" [zone]="${ZONE:-}" [project]="${PROJECT:-}" [accelerator-type]="${ACCELERATOR_TYPE:-}"
  [runtime-version]="${RUNTIME_VERSION:-}" [num-slices]=1)
SWITCHES=([spot]='')
parse "$@"

need_name
need zone ZONE
need accelerator-type ACCELERATOR_TYPE
need runtime-version RUNTIME_VERSION
need_number num-slices
need_config_in_checkout
need_shared_workdir
need_tool gcloud 'install the Google Cloud CLI'
need_tool git 'it lists what to copy'

name=${OPTIONS[name]}
place=("--zone=${OPTIONS[zone]}")
[[ -z ${OPTIONS[project]} ]] || place+=("--project=${OPTIONS[project]}")
tpus=(gcloud compute tpus)
if ((OPTIONS[num-slices] == 1)); then
  nodes=("--node-id=$name") kind=tpu-vm every=(--worker=all)
else
  nodes=("--node-count=${OPTIONS[num-slices]}" "--node-prefix=$name") kind=queued-resources every=(--node=all --worker=all)
fi

say() { printf '%s: %s\n' "$PROGRAM" "$1" >&2; }

state() {
  "${tpus[@]}" queued-resources describe "$name" "${place[@]}" '--format=value(state.state)' 2>/dev/null || true
}

create() {
  local create=("${tpus[@]}" queued-resources create "$name" "${nodes[@]}" "${place[@]}"
    "--accelerator-type=${OPTIONS[accelerator-type]}" "--runtime-version=${OPTIONS[runtime-version]}")
  [[ -z ${SWITCHES[spot]} ]] || create+=(--spot)
  run "${create[@]}" "${EXTRA[@]}"
}

# Tracked and new files, as they are here now; ignored ones (runs, environments) stay.
pack() {
  (cd "$ROOT" && git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
    [[ ! -e $file ]] || printf '%s\0' "$file"
  done | tar --null -T - -czf "$1")
}

# A run that a broken connection left behind still holds the chips: it is stopped, by its number and only if it is dccot.
stop_earlier="if [ -f ../dccot.pid ] && grep -qs dccot /proc/\$(cat ../dccot.pid)/cmdline; then
  kill \$(cat ../dccot.pid); tail --pid=\$(cat ../dccot.pid) -f /dev/null
fi"
dccot_words --distributed
command="set -e
mkdir -p dccot_jax && tar -xzf dccot_jax.tgz -C dccot_jax && cd dccot_jax
$stop_earlier
$(setup_command tpu)
echo \$\$ > ../dccot.pid
exec .venv/bin/dccot $(quoted "${WORDS[@]}")"

if [[ -n $DRY_RUN ]]; then
  create
  archive=dccot_jax.tgz
else
  asked=''
  until found=$(state) && [[ $found == ACTIVE ]]; do
    case $found in
      SUSPENDED | FAILED)
        [[ -z $asked || $found == SUSPENDED ]] || {
          say "$name is FAILED; see $(quoted "${tpus[@]}" queued-resources describe "$name" "${place[@]}")"
          exit 1
        }
        say "$name is $found; asking for it again"
        "${tpus[@]}" queued-resources delete "$name" "${place[@]}" --force --quiet
        create
        asked=1
        ;;
      '')
        if [[ -n $asked ]]; then sleep 30; else create; fi
        asked=1
        ;;
      *)
        say "$name is $found; looking again in 30 s"
        sleep 30
        ;;
    esac
  done
  folder=$(mktemp -d)
  trap 'rm -rf -- "$folder"' EXIT
  archive=$folder/dccot_jax.tgz
  pack "$archive"
fi
run "${tpus[@]}" "$kind" scp "$archive" "$name:dccot_jax.tgz" "${place[@]}" "${every[@]}"
run "${tpus[@]}" "$kind" ssh "$name" "${place[@]}" "${every[@]}" "--command=$command"
