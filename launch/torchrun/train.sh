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
#   --job ID             name of the job on that port (c10d; trellis)
#   --max-restarts N     start all ranks again after a failure, N times at most (0); not what a restart repeats
#   --grace S            seconds for a save after SIGTERM or SIGUSR1 before ranks are killed (30; torch before
#                        2.12 always gives 30). Must be given when the recipe's checkpoint.grace_s is not 30:
#                        this script does not read the recipe
#   --dry-run            print the exact command of each node and start nothing
#
# The run folder (--run-dir, runs/<recipe> unless given) and the data set must be on a file system all nodes share.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
nodes='' master='' port=29500 ranks='' rendezvous=c10d node_rank='' job=trellis restarts=0 grace=30 dry_run=0

fail() {
    printf 'train.sh: error: %s\n' "$*" >&2
    exit 2
}
number() { [[ $2 =~ ^[0-9]{1,9}$ ]] || fail "$1 $2: give a whole number"; }

while (($#)); do
    case $1 in
    --nodes | --master | --port | --ranks-per-node | --rendezvous | --node-rank | --job | --max-restarts | --grace)
        (($# >= 2)) || fail "$1 needs a value"
        case $1 in
        --nodes) nodes=$2 ;;
        --master) master=$2 ;;
        --port) port=$2 ;;
        --ranks-per-node) ranks=$2 ;;
        --rendezvous) rendezvous=$2 ;;
        --node-rank) node_rank=$2 ;;
        --job) job=$2 ;;
        --max-restarts) restarts=$2 ;;
        --grace) grace=$2 ;;
        esac
        shift 2
        ;;
    --dry-run)
        dry_run=1
        shift
        ;;
    -h | --help)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    -*) fail "$1: unknown option before the recipe; options of trellis train come after it" ;;
    *) break ;;
    esac
done

(($#)) || fail "no recipe: train.sh --nodes N --master HOST RECIPE"
[[ -n $nodes ]] || fail "--nodes is missing: how many machines?"
[[ -n $master ]] || fail "--master is missing: the address of the first machine"
number --nodes "$nodes"
number --port "$port"
number --max-restarts "$restarts"
number --grace "$grace"
# Base 10: to the shell a leading zero means octal.
nodes=$((10#$nodes)) port=$((10#$port)) restarts=$((10#$restarts)) grace=$((10#$grace))
((nodes >= 1)) || fail "--nodes $nodes: use 1 or more"

python=$root/.venv/bin/python
[[ -x $python ]] || python=python3
if [[ -z $ranks ]]; then
    ranks=$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)') || fail "torch is not installed: run launch/setup.sh train,data"
fi
number --ranks-per-node "$ranks"
ranks=$((10#$ranks))
((ranks >= 1)) || fail "--ranks-per-node $ranks: use 1 or more"

case $rendezvous in
c10d) [[ -z $node_rank ]] || fail "--node-rank belongs to --rendezvous static; c10d deals out the places" ;;
static)
    if ((!dry_run)); then
        [[ -n $node_rank ]] || fail "--rendezvous static needs --node-rank: 0 on $master, then 1, 2, ..."
        number --node-rank "$node_rank"
        node_rank=$((10#$node_rank))
        ((node_rank < nodes)) || fail "--node-rank $node_rank: with --nodes $nodes use 0 to $((nodes - 1))"
    fi
    ;;
*) fail "--rendezvous $rendezvous: use c10d or static" ;;
esac

# command NODE_RANK ARGUMENTS...: fills the array `line`.
command_of() {
    local place=$1
    shift
    # Ranks get SIGUSR1 as well, and 5 s beyond the grace to be gone. By the variable, because torch 2.11 refuses
    # the option --shutdown-timeout.
    line=(env "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$((grace + 5))" "$python" -m torch.distributed.run)
    line+=("--nnodes=$nodes" "--nproc-per-node=$ranks" "--max-restarts=$restarts")
    line+=("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    if [[ $rendezvous == static ]]; then
        line+=("--node-rank=$place" "--master-addr=$master" "--master-port=$port")
    else
        line+=(--rdzv-backend=c10d "--rdzv-endpoint=$master:$port" "--rdzv-id=$job")
    fi
    line+=(-m launch.cli train "$@")
}

cd -- "$root"
if ((dry_run)); then
    for ((place = 0; place < nodes; place++)); do
        command_of "$place" "$@"
        printf '# node %d\ncd %q &&' "$place" "$root"
        printf ' %q' "${line[@]}"
        printf '\n'
    done
    exit 0
fi
command_of "$node_rank" "$@"
exec "${line[@]}"
