# Sourced by the scripts beside it: finds Python and keeps the virtual environment .venv up to date.
# KINFLOW_VENV names another environment, PYTHON another interpreter.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${KINFLOW_VENV:-$root/.venv}
export PYTHONHASHSEED=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }
die() { say "$*"; exit 69; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python3.14}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "Python 3.10 or newer is not installed; install it, or name one: PYTHON=/path/to/python $0"
}

# Errors are shown, warnings are not: pip warns about every index that a machine's settings name and that is away.
pip() { "$venv/bin/python" -m pip install -qq "$@"; }

# ensure EXTRA [PACKAGE…]: the project with an extra, after packages whose version decides what the rest resolves to.
# Runs pip only when pyproject.toml or Python has changed since the last time.
ensure() {
    local extra=$1 python stamp key
    shift
    if [[ ! -x $venv/bin/python ]]; then
        python=$(find_python)
        say "making $venv with $("$python" --version)"
        "$python" -m venv "$venv" || die "$python has no venv; install it, on Debian: apt-get install python3-venv"
    fi
    stamp=$venv/.kinflow-$extra
    key=$("$venv/bin/python" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest(), sys.version_info[:3], sys.argv[1:])' "$root/pyproject.toml" "$@")
    if [[ -f $stamp && $(<"$stamp") == "$key" ]]; then
        return
    fi
    say "installing kinflow[$extra] into $venv"
    local package
    for package in "$@"; do
        pip "$package" || die "$package cannot be installed; see the error above"
    done
    pip -e "$root[$extra]" || die "kinflow[$extra] cannot be installed; see the error above"
    printf '%s\n' "$key" >"$stamp"
}
