#!/usr/bin/env bash
# Trains a recipe on the machines of a DeepSpeed hostfile, which are started over ssh from here.
#
#   launch/deepspeed/train.sh --hostfile FILE [options] RECIPE [options of trellis train]
#
#   --hostfile FILE      a line `HOST slots=N` for each machine; the first is the master. Slots are ranks, all alike
#   --master HOST        address of the first machine, if the others reach it by another name than ssh does
#   --port PORT          on that machine (29500); private networks only
#   --ssh-port PORT      of the ssh servers, if not 22
#   --max-restarts N     start all ranks again after a failure, N times at most (0); not what a restart repeats
#   --grace S            seconds for a save after SIGTERM or SIGUSR1; the recipe's checkpoint.grace_s unless given
#   --no-preflight       do not compare the machines before the ranks start
#   --dry-run            print the exact command of each machine and start nothing
#
# ssh must not ask for a password. All machines see this checkout, the run folder and the data set at the same paths.
# A signal to this script reaches the ranks of all machines; so does its end.
set -euo pipefail

# shellcheck source=launch/clusters/forward.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../clusters/forward.sh"
forward deepspeed "$@"
