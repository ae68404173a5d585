#!/usr/bin/env bash
# Every check of the repository: set-up, lint, types, layers, shell scripts, tests. Needs no root.
#
#   ./launch/test.sh                    everything
#   ./launch/test.sh tests/kernels -x   the checks, then pytest with these arguments
#
# With CI=true a skipped test that tests/skips_allowed.txt does not name is a failure.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$root"
launch/setup.sh train,data,evals,dev

check() {
    printf '== %s\n' "$*" >&2
    "$@"
}

PATH=$root/.venv/bin:$PATH
check ruff check .
check ruff format --check .
check lint-imports
if command -v shellcheck >/dev/null; then
    mapfile -t scripts < <(find launch .ci -name '*.sh' -o -name '*.sbatch' -o -path .ci/run)
    check shellcheck -x "${scripts[@]}"
else
    printf '== shellcheck is not here: shell scripts were not checked\n' >&2
fi

# The types take a minute of one core, beside the tests, which wait often; what they say comes last.
types=$(mktemp)
mypy >"$types" 2>&1 &
typing=$!
trap 'kill "$typing" 2>/dev/null || true; rm -f "$types"' EXIT
status=0
# Rooms side by side (tests/conftest.py), one more than CI has cores: tests of whole jobs wait a good part of their
# time. `-n 0` among the arguments puts all tests into one process.
check python -m pytest -n 3 --no-loadscope-reorder "$@" || status=$?
printf '== mypy\n' >&2
wait "$typing" || status=1
cat "$types"
exit "$status"
