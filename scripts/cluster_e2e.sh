#!/usr/bin/env bash
# The cluster of k8s/ in containers on this machine, with a training run that loses its pods; see cluster_e2e.py --help.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" quickstart
exec .venv/bin/python scripts/cluster_e2e.py "$@"
