#!/usr/bin/env bash
# Hands functions to the Nuclio of a CVAT on this machine, to run on its NVIDIA card: deploy.sh says more.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/deploy.sh" gpu "$@"
