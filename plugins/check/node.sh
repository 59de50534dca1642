#!/usr/bin/env bash
# The first run on a node with GPUs: everything of fly-trt that needs one, in one command and without the network.
# What is checked, what each check needs and where results go: node.py, or this command with --help.
#
#   TENSORRT_ROOT=/opt/tensorrt plugins/check/node.sh --out /tmp/fly_node
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/node.py" "$@"
