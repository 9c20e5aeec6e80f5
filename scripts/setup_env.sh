#!/usr/bin/env bash
# Make or renew the environment in .venv: the lock that fits this machine, then joinwise itself, editable.
#
#   PYTHON=python3.12      interpreter to use (default: the first of python3.11, python3.12, python3 that fits)
#   ACCELERATOR=cpu|gpu    which build of vLLM (default: gpu where `nvidia-smi -L` names a device, else cpu)
#   TORCH_CPU_INDEX=URL    where a CPU build of torch lies, if pip's own indexes have none
#
# Does nothing, in a moment, while the lock, pyproject.toml, the C++ kernels and the compiler are as they were.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=.venv
stamp=$venv/.joinwise-env
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '\033[1m==> %s\033[0m\n' "$*"; }
fail() { printf 'joinwise: %s\n' "$*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
            "$candidate" -c 'import ensurepip, venv' 2>/dev/null ||
                fail "$candidate has no venv module; on Debian or Ubuntu run: apt-get install python3-venv"
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11 or 3.12 is needed; tried: ${PYTHON:-python3.11 python3.12 python3}. Name another with PYTHON=..."
}

accelerator() {
    case "${ACCELERATOR:-}" in
        cpu | gpu) echo "$ACCELERATOR" ;;
        "") if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then echo gpu; else echo cpu; fi ;;
        *) fail "ACCELERATOR must be cpu or gpu, not '$ACCELERATOR'" ;;
    esac
}

checksum() { cat "$@" | cksum | tr ' \t' '--'; }

# The CPU build of torch has a version of its own (+cpu), which PyPI does not carry.
install_cpu_torch() {
    local wanted source=()
    wanted=$(sed -n 's/^torch==\([^ ;]*\).*/torch==\1+cpu/p' "$lock")
    if "$venv/bin/python" -m pip install --dry-run --quiet --no-deps "$wanted" >/dev/null 2>&1; then
        source=()
    else
        [ -n "${TORCH_CPU_INDEX:-}" ] || fail "pip's indexes carry no $wanted: set TORCH_CPU_INDEX to the address of PyTorch's CPU wheels (PyTorch's installation page names it)"
        source=(--index-url "$TORCH_CPU_INDEX")
    fi
    "$venv/bin/python" -m pip install --no-deps "${source[@]}" "$wanted"
}

kind=$(accelerator)
lock=requirements/$kind.lock
want_lock="$kind $(checksum "$lock")"
compiler=$("${CXX:-g++}" --version 2>/dev/null | head -n 1) || compiler="no C++ compiler"
want_project="$root $(checksum pyproject.toml setup.py kernels/native.* kernels/*/*.{cpp,h}) $compiler"

# Two makes at once would install into each other's way.
if command -v flock >/dev/null; then
    exec 9>.venv.lock
    flock -n 9 || { say "waiting for another run of this script"; flock 9; }
fi

have_lock="" have_project=""
if [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && "$venv/bin/python" -c '' 2>/dev/null; then
    { read -r have_lock && read -r have_project; } <"$stamp" || true
fi
[ "$have_lock" = "$want_lock" ] && [ "$have_project" = "$want_project" ] && exit 0

if [ -n "$have_lock" ] && [ "${have_lock%% *}" != "$kind" ]; then
    say "this environment was made for ${have_lock%% *}; making it again for $kind"
    rm -rf "$venv"
fi
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    say "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi
if [ "$have_lock" != "$want_lock" ]; then
    rm -f "$stamp"
    say "installing $(grep -c '^[a-z]' "$lock") packages of $lock (some minutes the first time)"
    if [ "$kind" = cpu ]; then install_cpu_torch; fi
    if [ -z "$have_lock" ]; then
        "$venv/bin/python" -m pip install --no-deps --require-hashes -r "$lock"
    else
        "$venv/bin/python" -m pip install --no-deps --require-hashes -r "$lock" | sed -u '/^Requirement already satisfied/d'
    fi
fi
say "installing joinwise itself"
complaints=$("$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation -e . 2>&1) ||
    fail "installing failed: $complaints"
compgen -G "kernels/_native*.so" >/dev/null ||
    say "the native kernels were not built ($compiler): plain torch stands in, tens of times slower"
printf '%s\n%s\n' "$want_lock" "$want_project" >"$stamp"
say "the $kind environment is ready in $venv"
