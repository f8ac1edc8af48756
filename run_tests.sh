#!/usr/bin/env bash
# Set up .venv and a Chromium if that is still to do, then check the code and run the tests. Arguments go to pytest.
# Stops at the first failure, and after 25 minutes in all with status 124.
#
#   ./run_tests.sh [pytest arguments, such as tests/decoding or -k gate]
set -euo pipefail

LIMIT_S=1500

cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"

# within_limit COMMAND...: run it with what is left of the time. The interrupt lets pytest name the test that it was in.
within_limit() {
    local left=$((LIMIT_S - SECONDS)) status=0
    echo "+ $*" >&2
    timeout --foreground --signal=INT --kill-after=15 "$((left > 1 ? left : 1))" "$@" || status=$?
    if ((status == 124 || status == 137)); then
        echo "error: not done after $LIMIT_S seconds" >&2
    fi
    return "$status"
}

within_limit bash -c 'set -euo pipefail; source utils/venv.sh; ensure_venv . requirements-dev.txt'
within_limit bash -c 'set -euo pipefail; source utils/venv.sh; ensure_chromium .'
within_limit .venv/bin/python -m ruff check .
within_limit .venv/bin/python -m ruff format --check .
within_limit .venv/bin/python -m mypy
within_limit .venv/bin/python -m pytest "$@"
