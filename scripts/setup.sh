# Sourced by quickstart.sh and test.sh: makes .venv with the package and the extra named in $1, once.
# PYTHON names the interpreter to build it with (python3 by default).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or later is needed; '$python' is $("$python" --version 2>&1 | cut -d' ' -f2)." \
         "Name another one: PYTHON=python3.12 bash $0" >&2
    exit 2
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
stamp=".venv/.installed-$1-$(cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
    echo "Installing into .venv (pinned by constraints.txt) ..." >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$1]" --constraint constraints.txt
    touch "$stamp"
fi
