"""Engine directories of backend tensorrt-llm-engine, whose engines the simulated Executor computes."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from fly_trt import LLM, AsyncLLM
from fly_trt.acceptance import AcceptanceParams
from fly_trt.manifest import ModelEngine, hash_directory, read_manifest, write_manifest
from fly_trt.params import SpeculativeConfig
from fly_trt.verification import FlyPolicy, HeadInfo
from simulated_executor import Executor

BACKEND = "tensorrt-llm-engine"


def write_directory(
    path: Path,
    onnx: Path,
    *,
    tp_size: int = 1,
    max_num_tokens: int | None = None,
    files: dict[str, bytes] | None = None,
    **speculative: Any,
) -> Path:
    """As fly-build would write it of the pair that the directory `onnx` was built of, with these settings and the rule
    that they say in the target."""
    built = read_manifest(onnx)
    settings = dict(built.speculative) | speculative
    head = HeadInfo(built.target.vocab_size, built.head.entropy_top_k, built.head.top_tokens)
    policy = SpeculativeConfig.from_dict(settings).policy(head)
    rule = None
    if isinstance(policy, FlyPolicy) and policy.is_loose:
        rule = {
            "threshold": policy.entropy_threshold,
            "full": policy.use_full_entropy,
            "window": policy.window,
            "lookahead": policy.lookahead,
            "top_k": built.head.entropy_top_k,
            "stops": built.head.stop_token_ids,
        }
    # A prompt is read as a whole, and a round's draft comes on top of a sequence (tensorrt_llm.builder.build).
    limits = built.limits.model_copy(update={"max_num_tokens": max_num_tokens or built.limits.max_seq_len})
    shutil.copytree(onnx / "tokenizer", path / "tokenizer")
    models: dict[str, ModelEngine] = {}
    for role, model in (("target", built.target), ("draft", built.draft)):
        if model is None:
            continue
        (path / role).mkdir(parents=True)
        sizes = limits.model_dump() | {"max_seq_len": limits.max_seq_len + limits.max_draft_len}
        config = {"pretrained_config": {"mapping": {"tp_size": tp_size}}, "build_config": sizes}
        (path / role / "config.json").write_text(json.dumps(config))
        plan = {"onnx": str(onnx), "role": role, "rule": rule if role == "target" else None}
        ranks = [f"{role}/rank{rank}.engine" for rank in range(tp_size)]
        for rank in ranks:
            (path / rank).write_text(json.dumps(plan))
        of_cpu = {"cpu_kernels": None, "rollout": None}
        models[role] = model.model_copy(update={"model": ranks[0], "other_ranks": ranks[1:], **of_cpu})
    for name, content in (files or {}).items():
        (path / name).write_bytes(content)
    changes = {
        "backend": BACKEND,
        "device": "cuda",
        "limits": limits,
        "speculative": settings,
        "target": models["target"],
        "draft": models.get("draft"),
        "files": hash_directory(path),
    }
    write_manifest(built.model_copy(update=changes), path)
    return path


def of_golden(config: dict[str, Any]) -> dict[str, Any]:
    """SpeculativeConfig's settings of a record in tests/assets/golden."""
    settings: dict[str, Any] = {
        "method": "multi_level" if config["multi_level"] else "draft_model",
        "num_speculative_tokens": config["num_speculative_tokens"],
        "acceptance": "fly" if config["fly"] else "exact",
    }
    if config["fly"]:
        fly = AcceptanceParams(
            fly_window_size=config["window"], fly_entropy_threshold=config["entropy_threshold"], preset="reference"
        )
        names = ("fly_window_size", "fly_entropy_threshold", "preset")
        settings |= {name: getattr(fly, name) for name in names}
    return settings


def executor_of(role: str) -> Executor:
    return next(executor for executor in Executor.alive if executor.role == role)


def wait_until_ended(llm: LLM | AsyncLLM, seconds: float = 30.0) -> None:
    """Until no request is served, and none runs on any executor: a cancelled one ends when its step does."""
    deadline = time.monotonic() + seconds
    gauges = [f"fly_trt:num_requests_{state}" for state in ("running", "waiting")]
    while any(llm.metrics()[gauge] for gauge in gauges) or any(executor.num_active for executor in Executor.alive):
        assert time.monotonic() < deadline, "a request still runs"
        time.sleep(0.002)
