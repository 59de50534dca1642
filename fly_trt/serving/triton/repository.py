"""Writes a model repository that a stock tritonserver serves: config.pbtxt, 1/model.py and, when asked, the engines."""

import importlib.resources
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

import fly_trt
from fly_trt.engines import find_backend
from fly_trt.engines.directory import num_ranks
from fly_trt.errors import ConfigError
from fly_trt.files import new_directory
from fly_trt.manifest import MANIFEST_NAME, Manifest, read_manifest
from fly_trt.service.config import DEFAULT_MAX_QUEUE_SIZE, ServiceConfig, resolve_sizes, resolve_speculative_config
from fly_trt.service.setting import describe_setting
from fly_trt.serving.triton.configuration import write_parameters
from fly_trt.serving.triton.tensors import INPUTS, OUTPUTS

CONFIG_NAME = "config.pbtxt"
VERSION = "1"
OWN_SCRIPT = "triton.sh"
"""Of a directory whose backend comes with Triton models, by fly-build."""
COPIED_ENGINE = "engine"
DEFAULT_QUEUE_SECONDS = 60.0
MAX_QUEUE_SECONDS = 1e9  # Triton counts nanoseconds in 64 bits
COPY_BLOCK_BYTES = 1 << 24
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SHELL_CHARACTER = re.compile(r"""[\s"'`$&|;<>(){}\[\]*?\\]""")
"""The backend starts a model through bash -c and does not quote its path."""

MODEL_PY = '''"""Serves the engines that config.pbtxt names. Python's fly-trt does the work: pip install fly-trt."""

from fly_trt.serving.triton.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''

Report = Callable[[int, int], None]
"""Takes the bytes that are copied and those that there are."""


@dataclass(frozen=True, kw_only=True)
class RepositoryPlan:
    """One model of a repository: `config` is the text of its config.pbtxt, `model_dir` where it will lie, `facts` what
    a user wants to see of it."""

    model_dir: Path
    engine_dir: Path
    manifest: Manifest
    config: str
    copies_engines: bool
    facts: dict[str, Any]


def make_plan(
    engine_dir: Path,
    repository: Path,
    *,
    name: str = "fly",
    instances: int = 1,
    gpus: Sequence[int] = (),
    copy_engines: bool = False,
    overwrite: bool = False,
    exclude_input_in_output: bool = True,
    max_queue_size: int = DEFAULT_MAX_QUEUE_SIZE,
    queue_timeout: float = DEFAULT_QUEUE_SECONDS,
    speculative: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> RepositoryPlan:
    """Checks everything that can be checked before something is written.

    instances: processes, each with engines of its own; of TensorRT engines on each GPU. gpus: their ids, as the server
    counts them; none means all. An engine of several ranks has an instance on so many GPUs, the first ones where none
    are named. queue_timeout: seconds that a request may wait, 0 is forever. speculative: overrides of
    the engine's SpeculativeConfig. settings: fields of ServiceConfig. Raises ConfigError or EngineError.
    """
    engine_dir = engine_dir.expanduser().resolve()
    manifest = read_manifest(engine_dir)
    if not NAME.fullmatch(name):
        raise ConfigError(f"name {name!r}: expected letters, digits, '.', '_' and '-', the first a letter or digit")
    if instances < 1:
        raise ConfigError(f"instances {instances}: expected at least 1")
    if not 0 <= queue_timeout <= MAX_QUEUE_SECONDS:
        raise ConfigError(f"queue_timeout {queue_timeout}: expected 0 to {MAX_QUEUE_SECONDS:g} seconds, 0 for no limit")
    backend = find_backend(engine_dir, manifest)
    if backend.schedules:
        script = engine_dir / OWN_SCRIPT
        way = f"run {script}, with NVIDIA's models" if script.is_file() else "serve it with AsyncLLM"
        raise ConfigError(f"{engine_dir}: fly-trt's Triton model does not serve {manifest.backend}: {way}")
    is_gpu = backend.is_gpu
    _check_gpus(gpus, manifest, is_gpu)
    settings = dict(settings or {})
    place = f"on {'GPUs ' + ', '.join(map(str, gpus)) + ' each' if gpus else 'each GPU'}"
    kind = "KIND_GPU" if is_gpu else "KIND_CPU"
    if (count := num_ranks(manifest)) > 1:
        instances, settings["devices"] = _spread(instances, gpus, count, manifest)
        kind, gpus, place = "KIND_MODEL", (), f"over {count} GPUs of {', '.join(map(str, settings['devices']))}"
    model_dir = repository.expanduser().absolute() / name
    _check_place(model_dir, engine_dir, overwrite)
    config = resolve_speculative_config(manifest, speculative or {})
    sizes = resolve_sizes(ServiceConfig.from_dict({**settings, "max_queue_size": max_queue_size}), config, manifest)
    text = _template().render(
        setting=describe_setting(manifest, config),
        version=fly_trt.__version__,
        engine=manifest.name,
        name=name,
        max_queue_size=max_queue_size,
        queue_timeout_us=round(queue_timeout * 1e6),
        instances=instances,
        kind=kind,
        gpus=gpus,
        parameters=write_parameters(
            COPIED_ENGINE if copy_engines else str(engine_dir),
            config,
            settings,
            exclude_input_in_output=exclude_input_in_output,
        ),
        inputs=INPUTS,
        outputs=OUTPUTS,
    )
    return RepositoryPlan(
        model_dir=model_dir,
        engine_dir=engine_dir,
        manifest=manifest,
        config=text,
        copies_engines=copy_engines,
        facts={
            "engines": f"{engine_dir} ({'copied' if copy_engines else 'referenced'})",
            "backend": manifest.backend,
            "instances": f"{instances} {place}" if is_gpu else instances,
            "requests in flight": sizes.max_batch_size,
            "method": config.method or "none",
            "acceptance": config.acceptance,
            "num_speculative_tokens": config.num_speculative_tokens,
        },
    )


def write_model(plan: RepositoryPlan, report: Report) -> None:
    """Writes the model elsewhere and renames it into its place: an error or Ctrl-C leaves what was there."""
    repository = plan.model_dir.parent
    repository.mkdir(parents=True, exist_ok=True)
    # A server would take a folder in the repository for a model; but a repository may be a file system of its own.
    is_mounted = repository.stat().st_dev != repository.parent.stat().st_dev
    with new_directory(plan.model_dir, beside=None if is_mounted else repository) as workspace:
        version_dir = workspace / VERSION
        version_dir.mkdir()
        (workspace / CONFIG_NAME).write_text(plan.config, encoding="utf-8")
        (version_dir / "model.py").write_text(MODEL_PY, encoding="utf-8")
        if plan.copies_engines:
            _copy_engines(plan, version_dir / COPIED_ENGINE, report)


def _check_gpus(gpus: Sequence[int], manifest: Manifest, is_gpu: bool) -> None:
    if gpus and not is_gpu:
        raise ConfigError(
            f"gpus {', '.join(map(str, gpus))}: {manifest.name} was built for {manifest.backend}, which runs on the "
            "CPU: leave --gpus out, or rebuild with --device cuda"
        )
    if any(gpu < 0 for gpu in gpus) or len(set(gpus)) != len(gpus):
        raise ConfigError(f"gpus {', '.join(map(str, gpus))}: expected different ids, 0 and up")


def _spread(instances: int, gpus: Sequence[int], count: int, manifest: Manifest) -> tuple[int, list[int]]:
    """How many instances there are, and the devices of all of them: `count` for each."""
    if not gpus:
        return instances, list(range(count * instances))
    if len(gpus) % count or instances not in (1, len(gpus) // count):
        wanted = f"{count * instances}" if instances > 1 else f"{count}, or a multiple of that,"
        raise ConfigError(
            f"gpus {', '.join(map(str, gpus))}: {manifest.name} was built for {count} ranks, a GPU each: give {wanted} "
            "of them"
        )
    return len(gpus) // count, list(gpus)


def _check_place(model_dir: Path, engine_dir: Path, overwrite: bool) -> None:
    if found := SHELL_CHARACTER.search(str(model_dir)):
        raise ConfigError(
            f"{model_dir}: Triton's python backend cannot start a model in a path with {found[0]!r}: choose another -o"
        )
    if engine_dir.is_relative_to(model_dir.resolve()):
        raise ConfigError(f"{model_dir}: would replace the engines that lie in it: choose another -o or --name")
    if not model_dir.exists():
        return
    if not overwrite:
        raise ConfigError(f"{model_dir}: already exists: choose another --name or pass --overwrite")
    if not (model_dir / CONFIG_NAME).is_file():
        raise ConfigError(f"{model_dir}: not a Triton model, so --overwrite does not replace it: choose another --name")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["quote"] = lambda value: json.dumps(str(value), ensure_ascii=False)
    source = importlib.resources.files(__package__) / f"{CONFIG_NAME}.jinja"
    return environment.from_string(source.read_text(encoding="utf-8"))


def _copy_engines(plan: RepositoryPlan, target: Path, report: Report) -> None:
    """What the manifest lists, and the manifest last."""
    sizes = {name: file.size for name, file in plan.manifest.files.items()}
    total, done = sum(sizes.values()), 0
    free = shutil.disk_usage(target.parent).free
    if total > free:
        raise ConfigError(f"{target.parent}: {free} bytes free, the engines have {total}: free some space")
    for name in sizes:
        destination = target / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        with (plan.engine_dir / name).open("rb") as source, destination.open("wb") as copy:
            while block := source.read(COPY_BLOCK_BYTES):
                copy.write(block)
                done += len(block)
                report(done, total)
    shutil.copy(plan.engine_dir / MANIFEST_NAME, target / MANIFEST_NAME)
