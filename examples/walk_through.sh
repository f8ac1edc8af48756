# What the walk-throughs share, which source this file: a folder for the output, a Python, and a way to show commands.
# shellcheck shell=bash

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=utils/venv.sh
source utils/venv.sh
ensure_venv . requirements.txt
# The example's models are too small to share a forward pass between cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# output_folder DEFAULT [FOLDER]: where a walk-through writes; a relative FOLDER is the caller's, who stood in $OLDPWD.
output_folder() {
    if (($# > 2)) || [[ ${2-} == -* ]]; then
        sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2
        exit 2
    fi
    if [[ -z ${2-} ]]; then
        echo "output/$1"
    else
        realpath -m --relative-base="$PWD" "$(cd "$OLDPWD" && realpath -m "$2")"
    fi
}

# step TEXT: say what comes next.
step() {
    printf '\n== %s\n' "$1"
}

# run SCRIPT FLAGS...: show a command and run it.
run() {
    if [[ $1 == *.py ]]; then
        printf '+ python'
        printf ' %q' "$@"
        printf '\n'
        .venv/bin/python "$@"
    else
        printf '+'
        printf ' %q' "./$1" "${@:2}"
        printf '\n'
        bash "$@"
    fi
}
