# shellcheck shell=bash
# Sourced by the scripts of launch/*/: hands what they are given to `trellis launch KIND`, which does the work.
# Here options of the launcher stand before the recipe and those of `trellis train` after it, without `--`.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)

fail() {
    printf '%s: error: %s\n' "${0##*/}" "$*" >&2
    exit 2
}

# The comment at the top of the script.
help() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }

# trellis ARGUMENTS...: the command of this checkout, on the path or not.
trellis() {
    local python=$root/.venv/bin/python
    [[ -x $python ]] || python=python3
    PYTHONSAFEPATH=1 PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m launch.cli "$@"
}

# forward KIND OPTIONS... RECIPE OPTIONS OF TRELLIS TRAIN...
forward() {
    local kind=$1 options=() recipe
    shift
    while (($#)); do
        case $1 in
        -h | --help)
            help
            exit 0
            ;;
        --dry-run | --no-preflight | --no-wait | --apply | --*=*)
            options+=("$1")
            shift
            ;;
        -*)
            (($# >= 2)) || fail "$1 needs a value"
            options+=("$1" "$2")
            shift 2
            ;;
        *) break ;;
        esac
    done
    (($#)) || fail "no recipe: ${0##*/} OPTIONS RECIPE"
    recipe=$1
    shift
    trellis launch "$kind" "${options[@]+"${options[@]}"}" "$recipe" -- "$@"
}
