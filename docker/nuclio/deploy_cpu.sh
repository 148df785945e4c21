#!/usr/bin/env bash
# Hands functions to the Nuclio of a CVAT on this machine, to run on its CPU: deploy.sh says more.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/deploy.sh" cpu "$@"
