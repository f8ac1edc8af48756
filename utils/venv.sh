# The virtual environment of the shell scripts, which source this file.
# shellcheck shell=bash

# ensure_venv ROOT REQUIREMENTS: make ROOT/.venv if there is none and install ROOT/REQUIREMENTS into it, unless that was
# done before and no requirements file has changed since. Everything is said on stderr.
ensure_venv() {
    local root=$1 requirements=$2
    local venv=$root/.venv wanted torch
    local stamp=$venv/.installed-$requirements
    wanted=$(cat "$root"/requirements*.txt)
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        return
    fi
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        _require_python
        echo "making $venv" >&2
        python3 -m venv "$venv" >&2
    fi
    echo "installing $requirements into $venv" >&2
    # torch by itself first, so that the build which the index offers for the pin is taken before anything depends on it.
    torch=$(grep '^torch==' "$root/requirements.txt")
    "$venv/bin/python" -m pip install --disable-pip-version-check "$torch" >&2
    "$venv/bin/python" -m pip install --disable-pip-version-check -r "$root/$requirements" >&2
    echo "$wanted" >"$stamp"
    # requirements-dev.txt holds requirements.txt.
    echo "$wanted" >"$venv/.installed-requirements.txt"
}

_require_python() {
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: Python 3.11 or later is needed as python3; got $(python3 --version 2>&1 || true)" >&2
        exit 2
    fi
}
