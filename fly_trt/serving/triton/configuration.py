"""What a model's config.pbtxt says about the runtime: written by fly-triton, read when Triton loads the model.

Parameters are the fields of SpeculativeConfig and ServiceConfig by their own names, as text. The queue is configured
where Triton's operators look for it, in dynamic_batching.default_queue_policy.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fly_trt.engines.cores import available_cores
from fly_trt.engines.directory import num_ranks
from fly_trt.errors import ConfigError
from fly_trt.manifest import read_manifest
from fly_trt.params import SpeculativeConfig
from fly_trt.service.config import DEFAULT_MAX_QUEUE_SIZE, ServiceConfig, resolve_speculative_config

ENGINE_DIR = "engine_dir"
EXCLUDE_INPUT = "exclude_input_in_output"
SPECULATIVE = tuple(field.name for field in dataclasses.fields(SpeculativeConfig))
# max_queue_size is the queue policy's; Triton says which device an instance has that has one.
SERVICE = tuple(
    field.name for field in dataclasses.fields(ServiceConfig) if field.name not in ("max_queue_size", "device_id")
)


def write_parameters(
    engine_dir: str,
    speculative_config: SpeculativeConfig,
    settings: Mapping[str, Any],
    *,
    exclude_input_in_output: bool,
) -> dict[str, str]:
    """The parameters of config.pbtxt. None is written out where the engine's own default could differ."""
    values = {name: getattr(speculative_config, name) for name in SPECULATIVE}
    values |= {name: value for name, value in settings.items() if value is not None}
    written = {name: _as_text(value) for name, value in values.items()}
    return {ENGINE_DIR: engine_dir} | written | {EXCLUDE_INPUT: _as_text(exclude_input_in_output)}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfiguration:
    """`settings` are AsyncLLM's. `queue_timeout`: seconds that a request may wait for a slot, None is forever; a
    request's own timeout counts where `allows_own_timeout` and it is shorter. `exclude_input_in_output` is the default
    for requests that do not say."""

    engine_dir: Path
    speculative_config: SpeculativeConfig
    settings: dict[str, Any]
    exclude_input_in_output: bool
    queue_timeout: float | None
    allows_own_timeout: bool

    @classmethod
    def read(
        cls,
        model_config: Mapping[str, Any],
        version_dir: Path,
        instance_kind: str,
        device_id: int,
        instance_name: str = "",
    ) -> Self:
        """From the configuration that Triton hands to a model instance.

        version_dir: the folder of model.py. instance_kind: "CPU", "GPU", or "MODEL" for an instance over several GPUs,
        which takes its own of those that `devices` names, by the number that its name ends with. Raises ConfigError for
        a parameter that is unknown or cannot be used, EngineError for a directory that is no engine.
        """
        values = _read_parameters(model_config)
        if ENGINE_DIR not in values:
            raise ConfigError(f"config.pbtxt has no parameter {ENGINE_DIR!r}: write it anew with fly-triton")
        engine_dir = version_dir / str(values.pop(ENGINE_DIR))
        excludes_input = values.pop(EXCLUDE_INPUT, True)
        if not isinstance(excludes_input, bool):
            raise ConfigError(f"config.pbtxt: {EXCLUDE_INPUT} {excludes_input!r}: expected true or false")
        settings = {name: values.pop(name) for name in SERVICE if name in values}
        method = {"method": values["method"]} if "method" in values else {}  # the default acceptance follows from it
        manifest = read_manifest(engine_dir)
        defaults = dataclasses.asdict(resolve_speculative_config(manifest, method))
        if instance_kind == "GPU":
            settings["device_id"] = device_id
        elif instance_kind == "MODEL" and isinstance(settings.get("devices"), list):
            settings["devices"] = _of_instance(settings["devices"], num_ranks(manifest), instance_name)
        else:
            settings.setdefault("num_threads", _threads_of_an_instance(model_config))
        policy = model_config.get("dynamic_batching", {}).get("default_queue_policy", {})
        settings["max_queue_size"] = int(policy.get("max_queue_size", 0)) or DEFAULT_MAX_QUEUE_SIZE
        return cls(
            engine_dir=engine_dir,
            speculative_config=SpeculativeConfig.from_dict(defaults | values),
            settings=settings,
            exclude_input_in_output=excludes_input,
            queue_timeout=int(policy.get("default_timeout_microseconds", 0)) / 1e6 or None,
            allows_own_timeout=bool(policy.get("allow_timeout_override", False)),
        )


def _read_parameters(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name, engine_dir as it is. Names in capitals are Triton's own, such as EXECUTION_ENV_PATH."""
    known = (ENGINE_DIR, EXCLUDE_INPUT, *SPECULATIVE, *SERVICE)
    values = {}
    for name, parameter in model_config.get("parameters", {}).items():
        if name.isupper():
            continue
        if name not in known:
            raise ConfigError(f"config.pbtxt: unknown parameter {name!r}: expected one of {', '.join(known)}")
        text = parameter["string_value"]
        values[name] = text if name == ENGINE_DIR else _from_text(text)
    return values


def _of_instance(devices: list[Any], count: int, instance_name: str) -> list[Any]:
    """Those of one instance, of which each has `count`; Triton's names end with _0, _1 and so on."""
    number = instance_name.rpartition("_")[2]
    begin = count * int(number) if number.isdecimal() else 0
    if len(own := devices[begin : begin + count]) < count:
        raise ConfigError(
            f"config.pbtxt: devices {devices}: {instance_name} needs {count} of its own: give {begin + count} of them, "
            "or fewer instances"
        )
    return own


def _threads_of_an_instance(model_config: Mapping[str, Any]) -> int | None:
    """The instances on the CPU share its cores; a single one takes what it finds."""
    groups = model_config.get("instance_group", [])
    num_instances = sum(int(group.get("count", 1)) for group in groups if group.get("kind") == "KIND_CPU")
    return max(1, available_cores() // num_instances) if num_instances > 1 else None


def _as_text(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def _from_text(text: str) -> Any:
    """Numbers, true and false as JSON has them; "none" is None, anything else a word."""
    if text == "none":
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text
