# What the shell scripts need to be there, which source this file: the virtual environment, and a browser for the tests.
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

# ensure_chromium ROOT: install a Chromium, which the tests of pages drive, where there is none and this user may do so.
# Never fails: without one those tests are skipped. What did not work is not tried again while ROOT/.venv is there.
ensure_chromium() {
    local stamp=$1/.venv/.no-chromium name
    for name in chromium chromium-browser google-chrome; do
        if command -v "$name" >/dev/null; then
            return
        fi
    done
    if [[ -e $stamp ]]; then
        return
    fi
    if ((EUID == 0)) && command -v apt-get >/dev/null; then
        echo "installing chromium" >&2
        # A mirror that does not answer is not waited for.
        if timeout 180 bash -c 'set -e
            export DEBIAN_FRONTEND=noninteractive
            options=(-qq -o Acquire::Retries=1 -o Acquire::http::Timeout=15 -o Acquire::https::Timeout=15)
            apt-get "${options[@]}" update
            apt-get "${options[@]}" install -y --no-install-recommends chromium' >/dev/null 2>&1; then
            return
        fi
    fi
    echo "there is no Chromium and it cannot be installed here: the tests of pages will be skipped" >&2
    touch "$stamp" 2>/dev/null || true
}
