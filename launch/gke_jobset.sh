#!/usr/bin/env bash
# A JobSet on Kubernetes (GKE): one pod per host of every TPU slice, or per GPU node.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

USAGE="$PROGRAM --image IMAGE (--tpu TYPE --topology AxB | --gpu TYPE --hosts N) --config FILE.py --workdir DIR [options]
    [--config.a.b=VALUE ...] [-- KUBECTL_OPTION ...]

Makes a JobSet of the kubectl context in use (the JobSet controller must be installed) and creates it; --dry-run prints the YAML.
A lost pod restarts the whole set, which goes on where it stopped; bad input (exit code 2) does not. Of a name, a set that is
finished is replaced and one at work is left alone.
  --image IMAGE            has this checkout as its working directory and dccot on its PATH; default \$IMAGE. Such as
                             COPY . /dccot_jax
                             WORKDIR /dccot_jax
                             RUN pip install '.[tpu]' gcsfs -c constraints/3.12.txt
  --tpu TYPE               node label gke-tpu-accelerator, such as tpu-v5-lite-podslice
  --topology AxB[xC]       node label gke-tpu-topology, such as 4x4
  --chips N                TPU chips per host; default 4
  --num-slices N           TPU slices, a node pool each, joined by the mesh axis data (--config.mesh.data=N); default 1
  --gpu TYPE               node label gke-accelerator, such as nvidia-h100-80gb
  --hosts N                GPU nodes; default 1
  --gpus N                 GPUs per node; default 8
  --claim NAME:PATH        mount this PersistentVolumeClaim there, for a workdir that is not a bucket
  --name NAME              of the JobSet; default dccot
  --restarts N             at most this many restarts; default 10"
OPTIONS=([image]="${IMAGE:-}" [tpu]='' [topology]='' [chips]=4 [num-slices]=1 [gpu]='' [hosts]=1 [gpus]=8 [claim]=''
  [name]=dccot [restarts]=10)
parse "$@"

need_name
need image IMAGE
need_number chips
need_number num-slices
need_number hosts
need_number gpus
need_number restarts
need_config_in_checkout
need_shared_workdir
need_tool kubectl 'install the Kubernetes command line'

name=${OPTIONS[name]} hosts=${OPTIONS[hosts]} port=12355
claim=${OPTIONS[claim]%%:*} mount=${OPTIONS[claim]#*:}
if [[ -n ${OPTIONS[claim]} ]]; then
  [[ ${OPTIONS[claim]} == ?*:/?* ]] || fail "--claim=${OPTIONS[claim]} must be NAME:/PATH"
fi
if [[ $WORKDIR == /* ]]; then
  [[ -n $claim && $WORKDIR/ == "${mount%/}"/* ]] || fail "--workdir=$WORKDIR is a pod's own disk; give a --claim mounted above it, or gs://BUCKET/PATH"
fi
if [[ -n ${OPTIONS[tpu]} && -z ${OPTIONS[gpu]} ]]; then
  [[ ${OPTIONS[topology]} =~ ^[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}$ ]] || fail "--topology=${OPTIONS[topology]} must be AxB or AxBxC, such as 4x4"
  chips=$((${OPTIONS[topology]//x/ * }))
  ((chips % OPTIONS[chips] == 0)) || fail "--topology=${OPTIONS[topology]} has $chips chips, which are no whole hosts of --chips=${OPTIONS[chips]}"
  hosts=$((chips / OPTIONS[chips]))
  dccot_words --distributed
  resource=google.com/tpu count=${OPTIONS[chips]}
  # A node pool is a slice: the pods of a job go to one, and no other job gets a part of it.
  placement='
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool'
  selector="              cloud.google.com/gke-tpu-accelerator: $(json "${OPTIONS[tpu]}")
              cloud.google.com/gke-tpu-topology: $(json "${OPTIONS[topology]}")"
elif [[ -n ${OPTIONS[gpu]} && -z ${OPTIONS[tpu]} ]]; then
  ((OPTIONS[num-slices] == 1)) || fail "--num-slices=${OPTIONS[num-slices]} is for --tpu; GPU nodes are counted by --hosts"
  # Names of pods are <set>-<job>-<job index>-<pod index>, and the set is their subdomain.
  dccot_words "--coordinator=$name-hosts-0-0.$name:$port" "--num_processes=$hosts" '--process_id=PROCESS'
  resource=nvidia.com/gpu count=${OPTIONS[gpus]} placement=''
  selector="              cloud.google.com/gke-accelerator: $(json "${OPTIONS[gpu]}")"
else
  fail 'one of --tpu and --gpu is needed'
fi

indent='              '
words="$indent- dccot"
for word in "${WORDS[@]}"; do
  if [[ $word == --process_id=PROCESS ]]; then
    # shellcheck disable=SC2016  # Kubernetes fills it in
    words+=$'\n'"$indent"'- "--process_id=$(PROCESS)"'
  else
    words+=$'\n'"$indent- $(json "$(kubernetes_escaped "$word")")"
  fi
done

manifest="apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name$placement
spec:
  failurePolicy:
    maxRestarts: ${OPTIONS[restarts]}
    rules:
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: hosts
    replicas: ${OPTIONS[num-slices]}
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {containerName: dccot, operator: In, values: [2]}
        template:
          spec:
            restartPolicy: Never
            nodeSelector:
$selector
            tolerations:
            - {key: $resource, operator: Exists, effect: NoSchedule}
            containers:
            - name: dccot
              image: $(json "${OPTIONS[image]}")
              command:
$words
              env:
              - name: PROCESS
                valueFrom: {fieldRef: {fieldPath: \"metadata.annotations['batch.kubernetes.io/job-completion-index']\"}}
              resources:
                limits: {$resource: $count}"
[[ -z ${OPTIONS[tpu]} ]] || manifest+="
              securityContext: {privileged: true}  # TPU runtimes lock more memory than a pod may"
[[ -z $claim ]] || manifest+="
              volumeMounts:
              - {name: workdir, mountPath: $(json "$mount")}
            volumes:
            - name: workdir
              persistentVolumeClaim: {claimName: $(json "$claim")}"

if [[ -n $DRY_RUN ]]; then
  printf '%s\n' "# $(quoted kubectl create "${EXTRA[@]}" -f -) <<'YAML'" "$manifest" '# YAML'
  exit
fi
# A set that is there has a name; one that is finished has a terminal state too.
found=$(kubectl get jobset "$name" "${EXTRA[@]}" --ignore-not-found -o 'jsonpath={.metadata.name}/{.status.terminalState}')
case $found in
  '' | /) ;;
  "$name/")
    printf '%s: JobSet %s is at work; follow it with kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=%s\n' "$PROGRAM" "$name" "$name" >&2
    exit 1
    ;;
  *) kubectl delete jobset "$name" "${EXTRA[@]}" --cascade=foreground ;;
esac
kubectl create "${EXTRA[@]}" -f - <<<"$manifest"
