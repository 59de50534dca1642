"""A model repository as a stock tritonserver reads it, that is never half written and never costs an engine."""

import importlib.util
import json
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup, ModelQueuePolicy

from fly_trt import ConfigError, EngineError
from fly_trt.manifest import MANIFEST_NAME, hash_directory, read_manifest, write_manifest
from fly_trt.service.config import DEFAULT_MAX_QUEUE_SIZE, ServiceConfig
from fly_trt.serving.triton.configuration import ModelConfiguration
from fly_trt.serving.triton.repository import COPY_BLOCK_BYTES, RepositoryPlan, make_plan, write_model
from fly_trt.serving.triton.tensors import INPUTS, OUTPUTS

FILES = {
    "target/model.onnx": b"graph",
    "target/model.onnx.data": b"weights",
    "draft/model.onnx": b"small graph",
    "draft/rollout.onnx": b"its rollout",
    "libfly_cpu.so": b"operators",
    "tokenizer/tokenizer.json": b"{}",
    "empty": b"",
}


def make_engine(built: Path, directory: Path, files: dict[str, bytes] = FILES, **changes: Any) -> Path:
    """The manifest of a built engine over small files."""
    directory.mkdir(parents=True)
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    manifest = read_manifest(built).model_copy(update={"files": hash_directory(directory), **changes})
    write_manifest(manifest, directory)
    return directory


@pytest.fixture
def engine(demo_engine: Path, tmp_path: Path) -> Path:
    return make_engine(demo_engine, tmp_path / "engines" / "small")


@pytest.fixture
def gpu_engine(demo_engine: Path, tmp_path: Path) -> Path:
    return make_engine(demo_engine, tmp_path / "engines" / "gpu", backend="tensorrt", device="cuda", name="gpu")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "models"


def silent(done: int, total: int) -> None:
    pass


def parsed(plan: RepositoryPlan) -> ModelConfig:
    """As the server parses it: an unknown field, a wrong type or a number out of range is an error."""
    return text_format.Parse(plan.config, ModelConfig())


def parameters(plan: RepositoryPlan) -> dict[str, str]:
    return {name: value.string_value for name, value in parsed(plan).parameters.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_model_is_a_configuration_and_the_python_file_of_version_1(engine: Path, repository: Path) -> None:
    plan = make_plan(engine, repository)
    assert plan.model_dir == repository / "fly"
    assert not repository.exists()  # a plan writes nothing
    write_model(plan, silent)
    assert contents(repository).keys() == {"fly/config.pbtxt", "fly/1/model.py"}
    assert (repository / "fly" / "config.pbtxt").read_text(encoding="utf-8") == plan.config


def test_model_py_is_the_model_that_the_package_has(engine: Path, repository: Path) -> None:
    """What it names exists; tests with a server run it."""
    write_model(make_plan(engine, repository), silent)
    source = (repository / "fly" / "1" / "model.py").read_text(encoding="utf-8")
    compile(source, "model.py", "exec")
    (line,) = [line for line in source.splitlines() if line.startswith("from ")]
    _, module, _, name = line.split()
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    assert f"class {name}:" in Path(spec.origin).read_text(encoding="utf-8")


def test_the_configuration_is_that_of_a_decoupled_python_model(engine: Path, repository: Path) -> None:
    config = parsed(make_plan(engine, repository, name="demo-1.0_x"))
    assert (config.name, config.backend, config.max_batch_size) == ("demo-1.0_x", "python", 1)
    assert config.model_transaction_policy.decoupled
    policy = config.dynamic_batching.default_queue_policy
    assert policy.max_queue_size == DEFAULT_MAX_QUEUE_SIZE
    assert policy.default_timeout_microseconds == 60_000_000
    assert policy.timeout_action == ModelQueuePolicy.TimeoutAction.REJECT
    assert policy.allow_timeout_override
    (group,) = config.instance_group
    assert (group.kind, group.count, list(group.gpus)) == (ModelInstanceGroup.Kind.KIND_CPU, 1, [])


def test_every_declared_tensor_is_in_the_configuration(engine: Path, repository: Path) -> None:
    config = parsed(make_plan(engine, repository))
    assert [(t.name, DataType.Name(t.data_type), tuple(t.dims), t.optional) for t in config.input] == [
        (spec.name, spec.data_type, spec.dims, True) for spec in INPUTS
    ]
    assert [(t.name, DataType.Name(t.data_type), tuple(t.dims)) for t in config.output] == [
        (spec.name, spec.data_type, spec.dims) for spec in OUTPUTS
    ]


def test_the_parameters_are_the_engine_and_the_settings_asked_for(engine: Path, repository: Path) -> None:
    plan = make_plan(
        engine,
        repository,
        exclude_input_in_output=False,
        speculative={"method": None, "acceptance": "exact"},
        settings={"max_batch_size": 4, "max_seq_len": 512, "num_threads": 2},
    )
    found = parameters(plan)
    assert found["engine_dir"] == str(engine)
    assert found["exclude_input_in_output"] == "false"
    assert (found["method"], found["acceptance"]) == ("none", "exact")
    assert plan.facts["requests in flight"] == 4
    assert (found["max_batch_size"], found["max_seq_len"], found["num_threads"]) == ("4", "512", "2")
    assert "max_batch_size" not in parameters(make_plan(engine, repository))
    assert parameters(make_plan(engine, repository))["exclude_input_in_output"] == "true"


@pytest.mark.parametrize(
    ("seconds", "microseconds"), [(0, 0), (0.25, 250_000), (8.2, 8_200_000), (3600, 3_600_000_000), (1e9, 10**15)]
)
def test_the_queue_is_as_asked_for(engine: Path, repository: Path, seconds: float, microseconds: int) -> None:
    policy = parsed(make_plan(engine, repository, max_queue_size=3, queue_timeout=seconds)).dynamic_batching
    assert policy.default_queue_policy.max_queue_size == 3
    assert policy.default_queue_policy.default_timeout_microseconds == microseconds


@pytest.mark.parametrize(
    ("asked", "count", "gpus", "fact"),
    [
        ({}, 1, [], "1 on each GPU"),
        ({"instances": 2}, 2, [], "2 on each GPU"),
        ({"gpus": [0, 3]}, 1, [0, 3], "1 on GPUs 0, 3 each"),
        ({"gpus": [1], "instances": 2}, 2, [1], "2 on GPUs 1 each"),
    ],
)
def test_tensorrt_engines_have_instances_on_gpus(
    gpu_engine: Path, repository: Path, asked: dict[str, Any], count: int, gpus: list[int], fact: str
) -> None:
    plan = make_plan(gpu_engine, repository, **asked)
    (group,) = parsed(plan).instance_group
    assert (group.kind, group.count, list(group.gpus)) == (ModelInstanceGroup.Kind.KIND_GPU, count, gpus)
    assert plan.facts["instances"] == fact


@pytest.fixture
def ranked_engine(demo_engine: Path, tmp_path: Path) -> Path:
    """An engine of two ranks, as far as its manifest goes."""
    target = read_manifest(demo_engine).target
    ranked = target.model_copy(update={"other_ranks": [target.model]})
    return make_engine(
        demo_engine, tmp_path / "engines" / "ranked", backend="tensorrt", device="cuda", name="ranked", target=ranked
    )


@pytest.mark.parametrize(
    ("asked", "count", "devices", "fact"),
    [
        ({}, 1, [0, 1], "1 over 2 GPUs of 0, 1"),
        ({"instances": 2}, 2, [0, 1, 2, 3], "2 over 2 GPUs of 0, 1, 2, 3"),
        ({"gpus": [6, 3]}, 1, [6, 3], "1 over 2 GPUs of 6, 3"),
        ({"gpus": [6, 3, 0, 1]}, 2, [6, 3, 0, 1], "2 over 2 GPUs of 6, 3, 0, 1"),
        ({"gpus": [6, 3, 0, 1], "instances": 2}, 2, [6, 3, 0, 1], "2 over 2 GPUs of 6, 3, 0, 1"),
    ],
)
def test_engines_of_several_ranks_have_instances_over_gpus(
    ranked_engine: Path, repository: Path, asked: dict[str, Any], count: int, devices: list[int], fact: str
) -> None:
    """Each instance, as Triton names them, finds its own."""
    plan = make_plan(ranked_engine, repository, **asked)
    (group,) = parsed(plan).instance_group
    assert (group.kind, group.count, list(group.gpus)) == (ModelInstanceGroup.Kind.KIND_MODEL, count, [])
    assert plan.facts["instances"] == fact
    config = json_format.MessageToDict(parsed(plan), preserving_proto_field_name=True)
    found = []
    for number in range(count):
        read = ModelConfiguration.read(config, repository, "MODEL", 0, f"fly_0_{number}")
        assert "device_id" not in read.settings
        found += ServiceConfig.from_dict(read.settings).devices
    assert found == devices
    with pytest.raises(ConfigError, match=rf"^config.pbtxt: devices .*: fly_0_{count} needs 2 of its own: give "):
        ModelConfiguration.read(config, repository, "MODEL", 0, f"fly_0_{count}")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"gpus": [0]}, "gpus 0: ranked was built for 2 ranks, a GPU each: give 2, or a multiple of that, of them"),
        ({"gpus": [0, 1, 2]}, "gpus 0, 1, 2: ranked was built for 2 ranks"),
        ({"gpus": [0, 1], "instances": 2}, "gpus 0, 1: ranked was built for 2 ranks, a GPU each: give 4 of them"),
    ],
)
def test_gpus_that_are_no_multiple_of_the_ranks_are_refused(
    ranked_engine: Path, repository: Path, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(ranked_engine, repository, **asked)
    assert str(caught.value).startswith(message)


def test_cpu_engines_have_instances_on_the_cpu(engine: Path, repository: Path) -> None:
    plan = make_plan(engine, repository, instances=3)
    (group,) = parsed(plan).instance_group
    assert (group.kind, group.count) == (ModelInstanceGroup.Kind.KIND_CPU, 3)
    assert plan.facts["instances"] == 3


@pytest.mark.parametrize(
    "folder", ['a "b"', "a'b", "back\\slash\\n", "a b", "grün 漢字", "new\nline\ttab", "{{ x }}%#"]
)
def test_any_engine_folder_is_written_as_it_is(demo_engine: Path, tmp_path: Path, folder: str) -> None:
    engine = make_engine(demo_engine, tmp_path / folder / "engine", name=f'{folder}\nbackend: "x"')
    plan = make_plan(engine, tmp_path / "models")
    assert parameters(plan)["engine_dir"] == str(engine)
    assert parsed(plan).backend == "python"
    write_model(plan, silent)
    assert (plan.model_dir / "config.pbtxt").read_text(encoding="utf-8") == plan.config


@pytest.mark.parametrize("folder", ["grün漢字", "a-b_c.d", "a=b,c+d@e:f%g", "~a#!^"])
def test_a_model_is_written_to_any_folder_that_a_shell_takes_as_it_is(
    engine: Path, tmp_path: Path, folder: str
) -> None:
    write_model(make_plan(engine, tmp_path / folder, copy_engines=True), silent)
    echo = subprocess.run(["bash", "-c", f"echo {tmp_path / folder}"], capture_output=True, text=True, check=True)
    assert echo.stdout == f"{tmp_path / folder}\n"
    read_manifest(tmp_path / folder / "fly" / "1" / "engine", verify_hashes=True)


@pytest.mark.parametrize("character", list(" \t\"'`$&|;<>(){}[]*?\\"))
def test_a_model_in_a_path_that_a_shell_takes_for_something_else_is_refused(
    engine: Path, tmp_path: Path, character: str
) -> None:
    """Triton's python backend does not quote it."""
    with pytest.raises(ConfigError, match="cannot start a model in a path with") as refused:
        make_plan(engine, tmp_path / f"a{character}b")
    assert f"{character!r}: choose another -o" in str(refused.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "engines"]


def test_a_relative_engine_path_is_written_as_an_absolute_one(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(engine)
    for path in ("engines/small", "link", "engines/../engines/small"):
        plan = make_plan(Path(path), Path("models"))
        assert parameters(plan)["engine_dir"] == str(engine.resolve())
        assert plan.model_dir == tmp_path / "models" / "fly"


def test_copied_engines_are_whole_and_need_the_original_no_more(
    demo_engine: Path, repository: Path, tmp_path: Path
) -> None:
    files = FILES | {"target/model.onnx.data": bytes(range(256)) * (COPY_BLOCK_BYTES // 256) + b"more than one block"}
    engine = make_engine(demo_engine, tmp_path / "large", files)
    (engine / "notes.txt").write_text("not the engine's")
    plan = make_plan(engine, repository, copy_engines=True)
    reports: list[tuple[int, int]] = []
    write_model(plan, lambda done, total: reports.append((done, total)))
    shutil.rmtree(engine)
    moved = repository.rename(tmp_path / "elsewhere")
    version_dir = moved / "fly" / "1"
    assert parameters(plan)["engine_dir"] == "engine"
    assert read_manifest(version_dir / "engine", verify_hashes=True) == plan.manifest
    assert {name: content for name, content in contents(version_dir / "engine").items() if name != "fly.json"} == files
    total = sum(map(len, files.values()))
    assert reports[-1] == (total, total)
    assert [done for done, _ in reports] == sorted({done for done, _ in reports})


@pytest.mark.parametrize("is_absolute", [False, True])
def test_a_foreign_engine_cannot_have_files_written_elsewhere(
    engine: Path, repository: Path, tmp_path: Path, is_absolute: bool
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    name = str(victim) if is_absolute else "../" * 4 + victim.name
    path = engine / MANIFEST_NAME
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"files": content["files"] | {name: {"size": 8, "sha256": ""}}}))
    with pytest.raises(EngineError, match="may lie outside the engine directory"):
        write_model(make_plan(engine, repository, copy_engines=True), silent)
    assert victim.read_bytes() == b"precious"
    assert not repository.exists()


def test_a_model_that_exists_is_replaced_only_when_asked(engine: Path, repository: Path) -> None:
    write_model(make_plan(engine, repository, copy_engines=True), silent)
    before = contents(repository)
    with pytest.raises(ConfigError, match="models/fly: already exists: choose another --name or pass --overwrite"):
        make_plan(engine, repository)
    assert contents(repository) == before
    write_model(make_plan(engine, repository, overwrite=True), silent)
    assert contents(repository).keys() == {"fly/config.pbtxt", "fly/1/model.py"}
    assert [path.name for path in repository.iterdir()] == ["fly"]


def test_models_of_other_names_stay(engine: Path, repository: Path) -> None:
    write_model(make_plan(engine, repository), silent)
    before = contents(repository)
    write_model(make_plan(engine, repository, name="exact", speculative={"acceptance": "exact"}), silent)
    assert before.items() < contents(repository).items()
    assert (repository / "exact" / "config.pbtxt").is_file()


@pytest.mark.parametrize("place", ["folder", "engine", "file"])
def test_what_is_no_model_is_never_replaced(engine: Path, repository: Path, place: str) -> None:
    if place == "engine":
        shutil.copytree(engine, repository / "fly")
    elif place == "folder":
        (repository / "fly").mkdir(parents=True)
    else:
        repository.mkdir()
        (repository / "fly").write_bytes(b"a file")
    before = contents(repository)
    with pytest.raises(ConfigError, match="models/fly: not a Triton model, so --overwrite does not replace it"):
        make_plan(engine, repository, overwrite=True)
    assert contents(repository) == before


@pytest.mark.parametrize("spelling", ["models", "link", "engines/../models"])
def test_engines_inside_the_model_are_not_deleted(
    engine: Path, repository: Path, tmp_path: Path, spelling: str
) -> None:
    write_model(make_plan(engine, repository, copy_engines=True), silent)
    (tmp_path / "link").symlink_to(repository)
    for copy_engines in (False, True):
        with pytest.raises(ConfigError, match="would replace the engines that lie in it: choose another -o or --name"):
            make_plan(
                repository / "fly" / "1" / "engine", tmp_path / spelling, overwrite=True, copy_engines=copy_engines
            )
    write_model(make_plan(repository / "fly" / "1" / "engine", tmp_path / spelling, name="other"), silent)
    read_manifest(repository / "fly" / "1" / "engine", verify_hashes=True)


def test_a_file_that_vanishes_while_it_is_copied_leaves_the_old_model(engine: Path, repository: Path) -> None:
    write_model(make_plan(engine, repository), silent)
    before = contents(repository)
    plan = make_plan(engine, repository, overwrite=True, copy_engines=True)
    (engine / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError):
        write_model(plan, silent)
    assert contents(repository) == before
    assert [path.name for path in repository.iterdir()] == ["fly"]


def test_an_interrupt_while_copying_leaves_nothing(engine: Path, repository: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_model(make_plan(engine, repository, copy_engines=True), interrupt)
    assert list(repository.iterdir()) == []


def test_too_little_space_is_found_before_anything_is_copied(
    engine: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = sum(map(len, FILES.values()))
    usage = namedtuple("usage", "total used free")
    reports: list[int] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10 * total, 0, total - 1))
    with pytest.raises(ConfigError, match=f"{total - 1} bytes free, the engines have {total}: free some space"):
        write_model(make_plan(engine, repository, copy_engines=True), lambda done, total: reports.append(done))
    assert reports == []
    assert list(repository.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10 * total, 0, total))
    write_model(make_plan(engine, repository, copy_engines=True), silent)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "-x", "a b", "grün", "a\n"])
def test_a_name_that_triton_or_a_folder_cannot_have_is_refused(engine: Path, repository: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected letters, digits, '\.', '_' and '-', the first a letter or digit"):
        make_plan(engine, repository, name=name)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"instances": 0}, "instances 0: expected at least 1"),
        ({"queue_timeout": -1}, "queue_timeout -1: expected 0 to"),
        ({"queue_timeout": float("nan")}, "queue_timeout nan: expected 0 to"),
        ({"queue_timeout": float("inf")}, "queue_timeout inf: expected 0 to"),
        ({"max_queue_size": 0}, "max_queue_size 0: expected a whole number, at least 1"),
        ({"gpus": [0]}, "demo was built for onnxruntime, which runs on the CPU: leave --gpus out"),
        ({"settings": {"max_batch_size": 99}}, "max_batch_size 99: demo was built for 8"),
        ({"settings": {"num_threads": 0}}, "num_threads 0"),
        ({"settings": {"threads": 1}}, "unknown setting 'threads'"),
        ({"speculative": {"num_speculative_tokens": 33}}, "num_speculative_tokens 33: built for max_draft_len 32"),
        ({"speculative": {"acceptance": "exact", "preset": "paper"}}, "preset 'paper': has no effect"),
        ({"speculative": {"fly_entropy_top_k": 5}}, "fly_entropy_top_k 5: the engine was built for 3"),
        ({"speculative": {"window": 5}}, "unknown field 'window'"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_written(
    engine: Path, repository: Path, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        make_plan(engine, repository, **asked)
    assert "\n" not in str(refused.value)
    assert not repository.exists()


@pytest.mark.parametrize("gpus", [[-1], [0, 0], [1, 0, 1]])
def test_gpus_are_different_ids(gpu_engine: Path, repository: Path, gpus: list[int]) -> None:
    with pytest.raises(ConfigError, match="expected different ids, 0 and up"):
        make_plan(gpu_engine, repository, gpus=gpus)


def test_a_missing_or_broken_engine_is_refused(engine: Path, repository: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="nowhere: no such engine directory"):
        make_plan(tmp_path / "nowhere", repository)
    (engine / "empty").unlink()
    with pytest.raises(EngineError, match="empty: file is missing"):
        make_plan(engine, repository)
