"""What TensorRT-LLM's PyTorch backend is started from: the YAML of its LLM API, and scripts with FLy's variables set.

Text alone, of plain values: every key of the YAML is in the table of names (names.py of fly_trt.integrations), which
says in which source it was read. The releases differ in their keys, and so does the YAML.
"""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fly_trt.errors import ConfigError
from fly_trt.integrations.tensorrt_llm.environment import NO_ACCEPTANCE, Acceptance
from fly_trt.integrations.tensorrt_llm.modes import Release, check_mode

YAML_FILE, SERVE_FILE = "tensorrt_llm.yaml", "serve.sh"
TRITON_YAML_FILE, TRITON_FILE = "triton.yaml", "triton.sh"
HOOK = "fly_trt.integrations.tensorrt_llm.import_hook"
FREE_GPU_MEMORY_FRACTION = 0.9  # TensorRT-LLM's own default
TOKENS_PER_BLOCK = 32  # of the paged KV cache, in both releases
# Beside the LLM API's own keys; the model file refuses to batch, and streams only where it is decoupled.
TRITON_CONFIG = {"max_batch_size": 0, "decoupled": True}

# By our name of a mode: what `decoding_type` is called in each release. "Eagle" was renamed, and is EAGLE3 in this
# backend; it must be read by the first 1.2 too.
DECODING_TYPES: dict[str, dict[Release, str]] = {
    "draft_target": {"1.2": "Draft_Target", "main": "Draft_Target"},
    "eagle3": {"1.2": "Eagle", "main": "Eagle3"},
    "mtp": {"1.2": "MTP", "main": "MTP"},
    "pard": {"1.2": "PARD", "main": "PARD"},
    "dflash": {"1.2": "DFlash", "main": "DFlash"},
    "sa": {"1.2": "SA", "main": "SA"},
}
MODES_WITHOUT_DRAFT = ("mtp", "sa")  # the target's own layers, or what it wrote, draft
HEAD_MODES = ("eagle3", "dflash")  # a draft that reads the target's hidden states, and needs no tokenizer
DRAFT_KEYS: dict[Release, str] = {"1.2": "speculative_model_dir", "main": "speculative_model"}


@dataclass(frozen=True)
class Serving:
    """What the LLM API shall do. target and draft are folders or hub ids; the latter may have a revision, a draft not:
    `speculative_config` has no place for one. num_draft_tokens are drafted in every round."""

    release: Release
    mode: str
    target: str
    revision: str | None
    draft: str | None
    num_draft_tokens: int
    dtype: str
    tensor_parallel_size: int
    max_batch_size: int
    max_seq_len: int
    max_num_tokens: int

    def speculative_config(self) -> dict[str, Any]:
        """Raises ConfigError for a mode that does not take FLy in this release, with the reason."""
        config: dict[str, Any] = {"decoding_type": DECODING_TYPES[self.mode][self.release]}
        check_mode(config, self.release)
        # The first 1.2 sets max_draft_len of MTP itself, from this.
        counts_heads = self.mode == "mtp" and self.release == "1.2"
        config["num_nextn_predict_layers" if counts_heads else "max_draft_len"] = self.num_draft_tokens
        if self.draft is not None:
            config[DRAFT_KEYS[self.release]] = self.draft
        return config

    def llm_args(self) -> dict[str, Any]:
        """The arguments of tensorrt_llm.LLM."""
        arguments: dict[str, Any] = {"model": self.target}
        if self.revision is not None:
            arguments["revision"] = self.revision
        arguments |= {
            "dtype": self.dtype,
            "tensor_parallel_size": self.tensor_parallel_size,
            "max_batch_size": self.max_batch_size,
            "max_seq_len": self.max_seq_len,
            "max_num_tokens": self.max_num_tokens,
            "attn_backend": "TRTLLM",
            "cuda_graph_config": {"max_batch_size": self.max_batch_size, "enable_padding": True},
            "kv_cache_config": {
                "enable_block_reuse": True,
                "free_gpu_memory_fraction": FREE_GPU_MEMORY_FRACTION,
                "dtype": "auto",
            },
            "speculative_config": self.speculative_config(),
        }
        if chunks_prompts(self.release):
            arguments["enable_chunked_prefill"] = True
        return arguments


def chunks_prompts(release: Release) -> bool:
    """Whether a prompt may be read in several steps beside speculation: so says the matrix of features of main, and
    none that could be read of 1.2."""
    return release == "main"


def check_drafting(mode: str, draft: str | None) -> None:
    """Raises ConfigError where a mode lacks its draft, or has one that it would not read."""
    if draft is None and mode not in MODES_WITHOUT_DRAFT:
        raise ConfigError(
            f"speculative_mode {mode}: there is no draft, and without speculation FLy has nothing to accept: add "
            f"--draft, or --speculative-mode {' or '.join(MODES_WITHOUT_DRAFT)}"
        )
    if draft is not None and mode in MODES_WITHOUT_DRAFT:
        raise ConfigError(f"speculative_mode {mode}: drafts without a draft model: leave --draft out")


def to_yaml(arguments: dict[str, Any]) -> str:
    import yaml  # of the extra `build`, which flags are checked without

    return yaml.safe_dump(arguments, sort_keys=False)


def serve_command(target: str, yaml_file: str) -> str:
    """Both releases take the flag, main under a newer name too."""
    return f"trtllm-serve {shlex.quote(target)} --extra_llm_api_options {yaml_file}"


def serve_script(target: str, draft: str | None, acceptance: Acceptance | None) -> str:
    """serve.sh: an OpenAI-compatible server. target, draft: folders or hub ids, as the YAML has them."""
    served = serve_command(target, f'"$here/{YAML_FILE}"')
    return _script(
        "An OpenAI-compatible server of TensorRT-LLM with FLy: serve.sh [FLAGS OF trtllm-serve]",
        SERVE_FILE,
        "trtllm-serve",
        (target, draft),
        acceptance,
        f'exec {served} "$@"\n',
    )


def triton_script(target: str, draft: str | None, acceptance: Acceptance | None) -> str:
    """triton.sh, for the same models: NVIDIA's model files are not part of it."""
    run = (
        'if [ "$#" -eq 0 ] || [ ! -f "$1/tensorrt_llm/1/model.py" ]; then\n'
        f'    echo "{TRITON_FILE}: expected a copy of TensorRT-LLM\'s triton_backend/all_models/llmapi" >&2\n'
        "    exit 2\n"
        "fi\n"
        "repository=$1\n"
        "shift\n"
        f'LLM_CONFIG_PATH="$here/{TRITON_YAML_FILE}"\n'
        "export LLM_CONFIG_PATH\n"
        'exec tritonserver --model-repository "$repository" "$@"\n'
    )
    usage = f"Triton with TensorRT-LLM and FLy: {TRITON_FILE} LLMAPI_MODELS [FLAGS OF tritonserver]"
    return _script(usage, TRITON_FILE, "tritonserver", (target, draft), acceptance, run)


def _script(
    usage: str, name: str, program: str, models: Iterable[str | None], acceptance: Acceptance | None, run: str
) -> str:
    """The rule is put into processes by a file of fly-trt's wheel, which Python runs at each start where the variable
    is set: without it the server would be exact without a word. One that shall be exact is so in any environment. A
    folder that has moved would be taken for a hub id."""
    variables = NO_ACCEPTANCE if acceptance is None else acceptance.to_environment()
    set_up = "".join(f"export {variable}={shlex.quote(value)}\n" for variable, value in variables.items())
    set_up += f'program=$(command -v {program}) || {{ echo "{name}: {program} is not on the PATH" >&2; exit 1; }}\n'
    for folder in (shlex.quote(model) for model in models if model is not None and Path(model).is_absolute()):
        said = f'echo "{name}: no such folder, build it again where it is now:" {folder} >&2'
        set_up += f"[ -d {folder} ] || {{ {said}; exit 1; }}\n"
    if acceptance is not None:
        set_up += (
            'python=$(dirname "$program")/python3\n'
            '[ -x "$python" ] || python=python3\n'
            f'if ! "$python" -c \'import sys; sys.exit("{HOOK}" not in sys.modules)\'; then\n'
            f'    echo "{name}: $python starts without fly-trt: $python -m pip install --no-deps fly-trt" >&2\n'
            "    exit 1\n"
            "fi\n"
        )
    here = 'here=$(CDPATH="" cd -- "$(dirname -- "$0")" && pwd)\n'
    return f"#!/bin/sh\n# {usage}\nset -eu\n{here}{set_up}{run}"
