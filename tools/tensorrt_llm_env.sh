#!/usr/bin/env bash
# An environment that has TensorRT-LLM 1.2, the last release with engines, and this fly-trt with its plugin library:
# NVIDIA's container. Needs docker with NVIDIA's runtime, and a network to make it. None of this has been run.
#
#   tools/tensorrt_llm_env.sh make              # the image
#   tools/tensorrt_llm_env.sh run COMMAND       # a shell command in it, on all GPUs, in the current folder
#
# In a command $FLY_PLUGINS is the plugin library. The current folder and the Hugging Face cache are the same inside;
# FLY_DOCKER_OPTIONS has further options of `docker run`, such as "-v /checkpoints:/checkpoints".
set -euo pipefail

release=1.2.1
base=${FLY_TENSORRT_LLM_IMAGE:-nvcr.io/nvidia/tensorrt-llm/release:$release}
image=fly-trt-tensorrt-llm:$release
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

make_image() {
    local folder
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' RETURN
    # TensorRT-LLM pins torch, transformers, tokenizers and numpy, some of them below what fly-trt asks for: fly-trt comes
    # without its dependencies, and of those only what touches none of the pinned is added.
    cat >"$folder/Dockerfile" <<EOF
FROM $base
COPY . /opt/fly-trt
RUN pip install --no-cache-dir --no-deps /opt/fly-trt \\
 && pip install --no-cache-dir 'click>=8.5,<9' 'jinja2>=3.1.6,<4' 'ml-dtypes>=0.5,<1' 'prometheus-client>=0.20,<1' \\
    'pydantic>=2.8,<3' 'pyyaml>=6,<7' 'rich>=13.7,<16' 'tqdm>=4.66,<5' \\
 && { command -v cmake >/dev/null || pip install --no-cache-dir cmake; }
RUN cmake -S /opt/fly-trt/plugins -B /opt/fly-plugins -DTENSORRT_ROOT=/usr/local/tensorrt \\
 && cmake --build /opt/fly-plugins --parallel
ENV FLY_PLUGINS=/opt/fly-plugins/libfly_plugins.so
EOF
    tar -c --exclude=__pycache__ -C "$root" pyproject.toml README.md LICENSE fly_trt build engines plugins \
        -C "$folder" Dockerfile | docker build --tag "$image" -
}

run_command() {
    local options
    read -ra options <<<"${FLY_DOCKER_OPTIONS:-}"
    mkdir -p "$HOME/.cache/huggingface"
    exec docker run --rm --gpus all --ipc host --ulimit memlock=-1 --ulimit stack=67108864 --env HF_TOKEN \
        --volume "$PWD:$PWD" --workdir "$PWD" --volume "$HOME/.cache/huggingface:/root/.cache/huggingface" \
        ${options[@]+"${options[@]}"} "$image" bash -c "$*"
}

case ${1:-} in
make) make_image ;;
run) run_command "${@:2}" ;;
*)
    echo "$(basename "$0"): expected 'make' or 'run COMMAND', got '${1:-}'" >&2
    exit 2
    ;;
esac
