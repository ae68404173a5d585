#!/usr/bin/env bash
# Prints the JobSet that trains a recipe on Kubernetes: launch/kubernetes/render.sh ... | kubectl apply -f -
#
#   launch/kubernetes/render.sh --nodes N --image IMAGE --claim CLAIM [options] RECIPE [options of trellis train]
#
#   --nodes N            pods, one per node
#   --image IMAGE        with this checkout at --checkout and its packages
#   --checkout PATH      in the image (/opt/trellis-dist)
#   --claim CLAIM        PersistentVolumeClaim (ReadWriteMany) for the run folder and the data set
#   --mount PATH         where pods see it, and work (/work)
#   --name NAME          of the JobSet (trellis-<recipe>); --namespace NAME
#   --gpus-per-node G    nvidia.com/gpu of a pod (0); --cpus C, --memory M as Kubernetes takes them
#   --ranks-per-node R   processes per pod; its GPUs unless given, else 1
#   --node-selector K=V  repeatable; --toleration KEY[=VALUE][:EFFECT] repeatable
#   --max-job-restarts N of the whole JobSet after failures (3); preemptions are not counted
#   --max-restarts N     of the ranks inside their pods (0); --port PORT (29500); private networks only
#   --no-preflight       do not compare the pods before the ranks start
#   --apply              hand it to kubectl at once; --dry-run prints, as without --apply
set -euo pipefail

# shellcheck source=launch/clusters/forward.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../clusters/forward.sh"
forward kubernetes "$@"
