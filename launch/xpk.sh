#!/usr/bin/env bash
# A workload on a GKE cluster that xpk made.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

USAGE="$PROGRAM --cluster CLUSTER --tpu-type TYPE --image IMAGE --config FILE.py --workdir DIR [options]
    [--config.a.b=VALUE ...] [-- XPK_OPTION ...]

Creates an xpk workload on every host of each slice. A workload of this name that is finished is replaced; xpk refuses one that is
still at work. A path in --workdir must be in storage that is attached to the cluster (xpk storage attach).
  --cluster CLUSTER        default \$CLUSTER
  --tpu-type TYPE          such as v5litepod-16; default \$TPU_TYPE
  --num-slices N           slices of that type, joined by the mesh axis data (--config.mesh.data=N); default 1
  --image IMAGE            has this checkout as its working directory and dccot on its PATH (see gke_jobset.sh --help);
                           default \$IMAGE
  --zone ZONE              default \$ZONE, else gcloud's
  --project PROJECT        default \$PROJECT, else gcloud's
  --name NAME              of the workload; default dccot
  --restarts N             at most this many restarts after lost hosts; default 10
Options after -- go to xpk workload create (--priority=high, --spot, --reservation=...)."
OPTIONS=([cluster]="${CLUSTER:-}" [tpu-type]="${TPU_TYPE:-}" [image]="${IMAGE:-}" [zone]="${ZONE:-}" [project]="${PROJECT:-}"
  [name]=dccot [restarts]=10 [num-slices]=1)
parse "$@"

need_name
need cluster CLUSTER
need tpu-type TPU_TYPE
need image IMAGE
need_number restarts
need_number num-slices
need_config_in_checkout
need_shared_workdir
need_tool xpk 'install it with pip install xpk'
need_tool kubectl 'xpk uses it'

name=${OPTIONS[name]}
where=("--cluster=${OPTIONS[cluster]}")
[[ -z ${OPTIONS[zone]} ]] || where+=("--zone=${OPTIONS[zone]}")
[[ -z ${OPTIONS[project]} ]] || where+=("--project=${OPTIONS[project]}")

if [[ -z $DRY_RUN ]]; then
  finished=$(xpk workload list "${where[@]}" --filter-by-status=FINISHED "--filter-by-job=$name")
  if awk -v name="$name" '$1 == name {found = 1} END {exit !found}' <<<"$finished"; then
    xpk workload delete "${where[@]}" "--workload=$name" --force
  fi
fi
# The command becomes a line of a script in a container's command: quoted for the shell, then escaped for Kubernetes.
dccot_words --distributed
command=$(kubernetes_escaped "dccot $(quoted "${WORDS[@]}")")
run xpk workload create "${where[@]}" "--workload=$name" "--tpu-type=${OPTIONS[tpu-type]}" "--num-slices=${OPTIONS[num-slices]}" \
  "--docker-image=${OPTIONS[image]}" "--max-restarts=${OPTIONS[restarts]}" "--command=$command" "${EXTRA[@]}"
