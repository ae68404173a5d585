#!/usr/bin/env bash
# Makes .venv beside the checkout and installs trellis-dist with the pinned versions; a second run does nothing.
#
#   launch/setup.sh EXTRAS        for example: launch/setup.sh train,data
#
# PYTHON selects the interpreter. A Python that has a CUDA build of torch keeps it.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
stamp=$venv/.trellis-installed
constraints=$root/constraints.txt
extras=${1:?usage: launch/setup.sh EXTRAS}

say() { printf 'setup: %s\n' "$*" >&2; }
fail() {
    printf 'setup: error: %s\n' "$*" >&2
    exit 1
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# The interpreter: PYTHON if it is set, otherwise the first one that is new enough.
find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON: no such command; give the path of a Python 3.11 or newer"
        new_enough "$PYTHON" || fail "PYTHON=$PYTHON is $("$PYTHON" -V 2>&1): trellis-dist needs Python 3.11 or newer"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null && new_enough "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer found; install one (Debian, Ubuntu: apt install python3 python3-venv) or set PYTHON=/path/to/python"
}

# Hash of what decides the installed versions.
wanted() { cat "$constraints" "$root/pyproject.toml" | sha256sum | cut -d ' ' -f 1; }

# True when the stamp carries this hash and every extra that is asked for.
installed() {
    local extra
    [[ -f $stamp && $(head -n 1 "$stamp") == "$1" ]] || return 1
    for extra in ${extras//,/ }; do
        grep -qx -- "$extra" "$stamp" || return 1
    done
}

has_gpu_torch() {
    "$1" -c 'import sys, torch; sys.exit(not (torch.version.cuda or torch.version.hip))' 2>/dev/null
}

make_venv() {
    local python=$1 options=()
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments; Debian, Ubuntu: apt install python3-venv"
    if has_gpu_torch "$python"; then
        say "keeping the torch of $python: it is built for a GPU"
        options=(--system-site-packages)
    fi
    "$python" -m venv --clear "${options[@]+"${options[@]}"}" "$venv" ||
        fail "$python -m venv failed; Debian, Ubuntu: apt install python3-venv"
}

has_pip() { "$venv/bin/python" -m pip --version >/dev/null 2>&1; }

pip_install() {
    local quiet=(--quiet)
    [[ -t 1 ]] && quiet=() # minutes without a word look like a hang
    "$venv/bin/python" -m pip install --disable-pip-version-check "${quiet[@]+"${quiet[@]}"}" "$@" ||
        fail "pip could not install ($*); the lines above say why. Without a network set PIP_INDEX_URL or PIP_FIND_LINKS to a mirror you can reach; with a full disk free about 4 GB; then run this again"
}

hash=$(wanted)
if installed "$hash"; then
    exit 0
fi
python=$(find_python)
# One that was killed while it was made has no pip: it gets one, or is made again.
has_pip || "$venv/bin/python" -m ensurepip >/dev/null 2>&1 || true
has_pip || make_venv "$python"
new_enough "$venv/bin/python" || fail "$venv is of another Python; remove it and run this again"

pins=$venv/constraints.txt
if has_gpu_torch "$venv/bin/python"; then
    grep -vE '^(torch|triton)==' "$constraints" >"$pins"
else
    cp "$constraints" "$pins"
    say "installing torch"
    pip_install -c "$pins" torch # first: DeepSpeed looks at it while it is installed
fi
say "installing trellis-dist[$extras] and what it needs (a few minutes)"
pip_install -c "$pins" -e "${root}[$extras]"

# Extras of earlier calls at the same hash stay installed.
previous=$([[ -f $stamp && $(head -n 1 "$stamp") == "$hash" ]] && tail -n +2 "$stamp" || true)
{
    printf '%s\n' "$hash"
    printf '%s\n' "$previous" "${extras//,/$'\n'}" | sed '/^$/d' | sort -u
} >"$stamp.new"
mv "$stamp.new" "$stamp"
say "done: $venv"
