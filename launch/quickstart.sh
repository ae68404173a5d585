#!/usr/bin/env bash
# The main job in one command: .venv with the pinned versions, then `trellis run quickstart`.
#
#   ./launch/quickstart.sh                        the running Python's own library as text, no download
#   ./launch/quickstart.sh --corpus my/texts      a folder of .txt, .jsonl(.gz/.zst) or .parquet
#
# Options are those of `trellis run`. A second run re-uses what is done. PYTHON selects the interpreter.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
TRELLIS_STARTED_AT=$(date +%s)
export TRELLIS_STARTED_AT

# A relative --corpus is meant from the caller's folder; the job runs in the checkout.
arguments=()
for argument; do
    path=${argument#--corpus=}
    if [[ $path != /* && -e $path ]] && [[ $argument == --corpus=* || ${previous:-} == --corpus ]]; then
        argument=${argument%"$path"}$PWD/$path
    fi
    previous=$argument
    arguments+=("$argument")
done

"$root/launch/setup.sh" train,data
cd -- "$root"
exec .venv/bin/trellis run quickstart "${arguments[@]+"${arguments[@]}"}"
