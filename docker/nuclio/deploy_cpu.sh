#!/usr/bin/env bash
# Deploys functions to the Nuclio of a CVAT on this machine, to run on its CPU; see deploy.sh.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/deploy.sh" cpu "$@"
