#!/usr/bin/env bash
# Trains a recipe on several machines with torchrun. Run the same command on every node.
#
#   launch/torchrun/train.sh --nodes N --master HOST [options] RECIPE [options of trellis train]
#
#   --nodes N            machines
#   --master HOST        address of the first machine, reachable from all (a private network: the port has no password)
#   --port PORT          on that machine (29500)
#   --ranks-per-node R   processes per machine; CUDA devices of this one unless given, else 1
#   --rendezvous KIND    c10d (default): nodes find each other, ranks are dealt out
#                        static: every node names its place with --node-rank, 0 on HOST
#   --node-rank I        this machine's place (static only)
#   --local-addr ADDRESS of this machine, where its host name leads the others elsewhere
#   --job ID             name of the job on that port (c10d; trellis)
#   --max-restarts N     start all ranks again after a failure, N times at most (0); not what a restart repeats
#   --grace S            seconds for a save after SIGTERM or SIGUSR1 before ranks are killed; the recipe's
#                        checkpoint.grace_s unless given (torch before 2.12 always gives 30)
#   --no-preflight       do not compare the machines before the ranks start
#   --dry-run            print the exact command of each node and start nothing
#
# The run folder (--run-dir, runs/<recipe> unless given) and the data set must be on a file system all nodes share.
# Exit status: 0 done, 1 error, 2 misuse, 75 asked to end with what was trained saved, 130 interrupted.
set -euo pipefail

# shellcheck source=launch/clusters/forward.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../clusters/forward.sh"
forward torchrun "$@"
