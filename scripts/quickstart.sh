#!/usr/bin/env bash
# From an empty clone to painted pictures; run it again to continue where it stopped. See --help.
began=$SECONDS
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" quickstart
exec .venv/bin/python scripts/quickstart.py --install-seconds $((SECONDS - began)) "$@"
