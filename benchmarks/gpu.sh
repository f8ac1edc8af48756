#!/usr/bin/env bash
# What a machine with a CUDA GPU does: the tests of every path that asks for the device, then decoding, retrieval and
# stage 2 at the shapes of known models. At most 12 minutes, offline; needs the packages of requirements-dev.txt.
#
#   benchmarks/gpu.sh [--model FOLDER] [--output FILE] [--dry_run]    (--help says more)
#
# Takes .venv's Python where there is a .venv, else python3, or the one that the variable PYTHON names.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON-}
if [[ -z $python ]]; then
    python=python3
    if [[ -x .venv/bin/python ]]; then
        python=.venv/bin/python
    fi
fi
exec "$python" benchmarks/gpu.py "$@"
