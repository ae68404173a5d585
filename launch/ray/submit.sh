#!/usr/bin/env bash
# Trains a recipe on a Ray cluster: a Ray job whose driver places one worker on each of N nodes.
#
#   launch/ray/submit.sh --nodes N [options] RECIPE [options of trellis train]
#
#   --nodes N            nodes of the cluster, a worker on each
#   --address URL        of the cluster's dashboard (http://127.0.0.1:8265)
#   --gpus-per-node G    that a worker reserves (0); --cpus-per-node C likewise (1)
#   --ranks-per-node R   processes per node; its reserved GPUs unless given, else 1
#   --port PORT          on the first worker's node (29500); private networks only
#   --max-restarts N     start all ranks again after a failure, N times at most (0); not what a restart repeats
#   --no-wait            submit, and do not follow the output
#   --no-preflight       do not compare the nodes before the ranks start
#   --dry-run            print the exact commands and submit nothing
#
# Needs ray[default] here and on the cluster, whose nodes see this checkout, the run folder and the data set.
set -euo pipefail

# shellcheck source=launch/clusters/forward.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../clusters/forward.sh"
forward ray "$@"
