# What the shell scripts need to be there, which source this file: the virtual environment, and a browser for the tests.
# shellcheck shell=bash

# ensure_venv ROOT REQUIREMENTS: make ROOT/.venv if there is none and install ROOT/REQUIREMENTS into it, in the versions of
# ROOT/constraints.txt, unless that was done before and none of these files has changed since. Everything is said on
# stderr; what pip says goes to a file.
ensure_venv() {
    local root=$1 requirements=$2
    local venv=$root/.venv wanted
    local stamp=$venv/.installed-$requirements log=$venv/pip.log
    wanted=$(cat "$root"/requirements*.txt "$root/constraints.txt")
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        return
    fi
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        _require_python
        python3 -m venv "$venv" >&2
    fi
    echo "installing PyTorch, transformers and what else $requirements names into $venv: up to 1.5 GB, some minutes" >&2
    # torch by itself first, so that the build which the index offers for it is taken before anything depends on it.
    if ! _pip_install torch || ! _pip_install -r "$root/$requirements"; then
        echo "error: pip could not install $requirements; what it said is in $log" >&2
        exit 2
    fi
    echo "$wanted" >"$stamp"
    # requirements-dev.txt holds requirements.txt.
    echo "$wanted" >"$venv/.installed-requirements.txt"
}

# ensure_packages ROOT PACKAGE...: install what only some scripts need into ROOT/.venv, where it is missing there.
ensure_packages() {
    local root=$1 venv=$1/.venv log=$1/.venv/pip.log
    local is_there="import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))"
    if "$venv/bin/python" -c "$is_there" "${@:2}"; then
        return
    fi
    echo "installing ${*:2} into $venv" >&2
    if ! _pip_install "${@:2}"; then
        echo "error: pip could not install ${*:2}; what it said is in $log" >&2
        exit 2
    fi
}

# _pip_install WHAT...: with the variables of those above.
_pip_install() {
    "$venv/bin/python" -m pip install --disable-pip-version-check -c "$root/constraints.txt" "$@" >>"$log" 2>&1
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
