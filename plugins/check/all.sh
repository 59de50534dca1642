#!/usr/bin/env bash
# The check of the plugins on a machine with a GPU, nvcc, and Python with NumPy and PyTorch, in one command: the kernels
# against NumPy, their speed beside device copies and PyTorch, and the plugin classes through TensorRT's interfaces.
# Arguments go to kernels.py; with --cpu it needs g++ and NumPy in place of GPU, nvcc and PyTorch.
#
#   TENSORRT_ROOT=/opt/tensorrt plugins/check/all.sh [--json] [--cpu]
#
# Without TensorRT's headers the part on the plugin classes says that it is skipped.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"${PYTHON:-python3}" "$here/kernels.py" "$@"
"$here/plugins.sh"
