#!/usr/bin/env bash
# Sets everything up and runs the tests; arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev
# Two at a time: tests wait for processes most of the time. A file stays in one worker, with its servers.
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
