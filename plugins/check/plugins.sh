#!/usr/bin/env bash
# Builds the plugin library and its harness and runs the harness; without a GPU it leaves out the launches.
#
#   TENSORRT_ROOT=/opt/tensorrt plugins/check/plugins.sh [BUILD_DIR] [CMAKE_OPTION...]
#   TENSORRT_ROOT=/opt/tensorrt plugins/check/plugins.sh /tmp/fly_plugins -DCMAKE_CUDA_ARCHITECTURES=90
#
# Without TENSORRT_ROOT the headers of the system serve. Where TensorRT's headers, nvcc or cmake are missing it says so
# in one line that begins with "skipped:" and exits with 0.
set -euo pipefail

source_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build_dir=${1:-$(mktemp -d)}
PATH=$PATH:/usr/local/cuda/bin

skip() {
    echo "skipped: $1"
    exit 0
}

has_system_headers() {
    printf '#if !__has_include(<NvInferRuntime.h>)\n#error\n#endif\n' | c++ -E -x c++ - >/dev/null 2>&1
}

[[ -n ${TENSORRT_ROOT:-} ]] || has_system_headers || skip "no TensorRT headers: set TENSORRT_ROOT"
command -v "${CUDACXX:-nvcc}" >/dev/null || skip "no nvcc: install the CUDA toolkit or set CUDACXX"
command -v cmake >/dev/null || skip "no cmake: install CMake 3.18 or newer"

cmake -S "$source_dir" -B "$build_dir" -DFLY_BUILD_CHECKS=ON "-DTENSORRT_ROOT=${TENSORRT_ROOT:-}" "${@:2}"
cmake --build "$build_dir" --parallel "${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}"

gpu_option=()
nvidia-smi -L >/dev/null 2>&1 || gpu_option=(--no-gpu)
"$build_dir/fly_plugin_harness" "$build_dir/libfly_plugins.so" "${gpu_option[@]}"
echo "library: $build_dir/libfly_plugins.so"
