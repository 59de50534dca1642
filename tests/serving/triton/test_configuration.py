"""What fly-triton writes into config.pbtxt, and what operators make of it, is what a model instance is served with."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format, text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc.model_config_pb2 import ModelConfig

from fly_trt import ConfigError, EngineError, SpeculativeConfig
from fly_trt.engines.cores import available_cores
from fly_trt.manifest import MANIFEST_NAME, Limits, read_manifest, write_manifest
from fly_trt.service.config import DEFAULT_MAX_QUEUE_SIZE, ServiceConfig, resolve_speculative_config
from fly_trt.serving.triton.configuration import ModelConfiguration, write_parameters
from fly_trt.serving.triton.repository import make_plan

CORES = available_cores()
NOWHERE = Path("/nowhere/1")
ENGINE_DEFAULTS: dict[str, dict[str, Any]] = {
    "none": {},
    "fly": {"preset": "paper", "fly_entropy_threshold": 0.4, "fly_window_size": 3, "num_speculative_tokens": 7},
    "exact": {"acceptance": "exact", "method": "draft_model", "adaptive_draft_length": False},
    "ngram": {"method": "ngram", "prompt_lookup_max": 9, "prompt_lookup_min": 2, "fly_entropy_top_k": 3},
    "plain": {"method": None},
}


def engine_with(built: Path, directory: Path, **changes: Any) -> Path:
    """A built engine with another manifest."""
    shutil.copytree(built, directory, copy_function=os.link)
    (directory / MANIFEST_NAME).unlink()
    write_manifest(read_manifest(built).model_copy(update=changes), directory)
    return directory


@pytest.fixture(scope="module")
def engines(demo_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By the name of the defaults that they were built with, and one without a draft, one for no drafts at all."""
    folder = tmp_path_factory.mktemp("engines")
    made = {name: engine_with(demo_engine, folder / name, speculative=d) for name, d in ENGINE_DEFAULTS.items()}
    made["target_only"] = engine_with(demo_engine, folder / "target_only", draft=None)
    limits = Limits(max_batch_size=8, max_seq_len=2048, max_draft_len=0, max_num_tokens=512)
    made["no_drafts"] = engine_with(demo_engine, folder / "no_drafts", limits=limits)
    return made


def read(
    parameters: dict[str, str], instance_kind: str = "CPU", device_id: int = 0, **model_config: Any
) -> ModelConfiguration:
    texts = {name: {"string_value": text} for name, text in parameters.items()}
    return ModelConfiguration.read({"parameters": texts, **model_config}, NOWHERE, instance_kind, device_id)


@pytest.fixture
def read_with(engines: dict[str, Path]) -> Callable[..., ModelConfiguration]:
    """Reads a configuration that has nothing but an engine and these parameters."""

    def read_with(engine: str = "none", /, **parameters: str) -> ModelConfiguration:
        return read({"engine_dir": str(engines[engine]), **parameters})

    return read_with


@st.composite
def speculative_configs(draw: st.DrawFn) -> SpeculativeConfig:
    shortest = draw(st.integers(1, 5))
    return SpeculativeConfig(
        method=draw(st.sampled_from(["multi_level", "draft_model", "ngram", None])),
        num_speculative_tokens=draw(st.integers(1, 40)),
        prompt_lookup_min=shortest,
        prompt_lookup_max=draw(st.integers(shortest, 9)),
        prompt_lookup_num_tokens=draw(st.integers(1, 20)),
        adaptive_draft_length=draw(st.booleans()),
        acceptance=draw(st.sampled_from(["fly", "exact", "typical", None])),
        exact_first=draw(st.none() | st.integers(0, 9)),
        exact_within=draw(st.none() | st.lists(st.sampled_from(["code", "after:</a>"]))),
        exact_token_ids=draw(st.none() | st.lists(st.integers(0, 9))),
        typical_alpha=draw(st.none() | st.floats(0, 1)),
        preset=draw(st.sampled_from(["reference", "paper", "vllm"])),
        fly_window_size=draw(st.none() | st.integers(0, 20)),
        fly_entropy_threshold=draw(st.none() | st.floats(0, allow_nan=False) | st.integers(0, 9)),
        fly_entropy_top_k=draw(st.none() | st.integers(1, 5)),
    )


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "max_batch_size": st.integers(1, 99),
        "max_seq_len": st.integers(1, 99),
        "max_num_tokens": st.integers(1, 99),
        "num_threads": st.integers(1, 99),
        "enable_prefix_caching": st.booleans(),
        "verify_hashes": st.booleans(),
    },
)


@given(config=speculative_configs(), settings=SETTINGS, excludes_input=st.booleans(), data=st.data())
def test_what_is_written_is_read_back_whatever_the_engines_defaults(
    engines: dict[str, Path],
    config: SpeculativeConfig,
    settings: dict[str, Any],
    excludes_input: bool,
    data: st.DataObject,
) -> None:
    engine_dir = engines[data.draw(st.sampled_from(sorted(engines)))]
    found = read(write_parameters(str(engine_dir), config, settings, exclude_input_in_output=excludes_input))
    assert found == ModelConfiguration(
        engine_dir=engine_dir,
        speculative_config=config,
        settings={"num_threads": None} | settings | {"max_queue_size": DEFAULT_MAX_QUEUE_SIZE},
        exclude_input_in_output=excludes_input,
        queue_timeout=None,
        allows_own_timeout=False,
    )


def test_a_setting_that_is_none_is_left_to_the_engine(engines: dict[str, Path]) -> None:
    settings = {"max_batch_size": None, "max_seq_len": 100}
    written = write_parameters("x", SpeculativeConfig(), settings, exclude_input_in_output=True)
    assert written["max_seq_len"] == "100"
    assert "max_batch_size" not in written


@pytest.mark.parametrize("engine", [*ENGINE_DEFAULTS, "target_only", "no_drafts"])
def test_without_a_line_everything_is_as_the_engine_was_built(engines: dict[str, Path], engine: str) -> None:
    found = read({"engine_dir": str(engines[engine])})
    assert found.speculative_config == resolve_speculative_config(read_manifest(engines[engine]), {})
    assert ServiceConfig.from_dict(found.settings) == ServiceConfig()
    assert found.exclude_input_in_output


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("method", "ngram", "ngram"),
        ("method", "none", None),
        ("num_speculative_tokens", "4", 4),
        ("prompt_lookup_max", "8", 8),
        ("prompt_lookup_min", "2", 2),
        ("prompt_lookup_num_tokens", "5", 5),
        ("adaptive_draft_length", "false", False),
        ("acceptance", "exact", "exact"),
        ("preset", "vllm", "vllm"),
        ("fly_window_size", "6", 6),
        ("fly_window_size", "none", None),
        ("fly_entropy_threshold", "0.5", 0.5),
        ("fly_entropy_threshold", "none", None),
        ("fly_entropy_top_k", "3", 3),
    ],
)
def test_a_parameter_wins_over_the_engines_default(
    read_with: Callable[..., ModelConfiguration], name: str, text: str, value: Any
) -> None:
    found = read_with("fly", **{name: text}).speculative_config
    expected = {"method": "multi_level", "acceptance": "fly", **ENGINE_DEFAULTS["fly"], name: value}
    if (name, value) == ("method", "ngram"):
        expected["acceptance"] = "exact"  # as it is in Python
    assert found == SpeculativeConfig(**expected)
    assert getattr(found, name) == value


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_batch_size", "2", 2),
        ("max_seq_len", "100", 100),
        ("max_num_tokens", "64", 64),
        ("enable_prefix_caching", "false", False),
        ("num_threads", "3", 3),
        ("num_threads", "none", None),
        ("verify_hashes", "true", True),
        ("audit_fraction", "0.05", 0.05),
    ],
)
def test_a_setting_of_the_service_is_a_parameter(
    read_with: Callable[..., ModelConfiguration], name: str, text: str, value: Any
) -> None:
    assert ServiceConfig.from_dict(read_with(**{name: text}).settings) == ServiceConfig(**{name: value})


def test_an_unknown_parameter_is_refused_and_the_right_names_are_told(
    read_with: Callable[..., ModelConfiguration],
) -> None:
    for name in ("max_batch", "device_id", "max_queue_size", "Method"):
        with pytest.raises(ConfigError, match=f"unknown parameter '{name}': expected one of engine_dir, ") as refused:
            read_with(**{name: "1"})
        assert all(known in str(refused.value) for known in ("num_threads", "preset", "exclude_input_in_output"))


def test_names_in_capitals_are_tritons(read_with: Callable[..., ModelConfiguration]) -> None:
    found = read_with(EXECUTION_ENV_PATH="/env.tar.gz", FORCE_CPU_ONLY_INPUT_TENSORS="yes")
    assert found == read_with()


def test_engine_dir_is_absolute_or_relative_to_the_version_folder(demo_engine: Path, tmp_path: Path) -> None:
    version_dir = tmp_path / "fly" / "1"
    version_dir.mkdir(parents=True)
    engine = engine_with(demo_engine, version_dir / "engine")
    for text in ("engine", "../1/engine", str(engine)):
        config = {"parameters": {"engine_dir": {"string_value": text}}}
        found = ModelConfiguration.read(config, version_dir, "CPU", 0)
        assert found.engine_dir.samefile(engine)


@pytest.mark.parametrize("name", ["none", "true", "5"])
def test_engine_dir_is_never_taken_for_anything_but_a_path(demo_engine: Path, tmp_path: Path, name: str) -> None:
    engine_with(demo_engine, tmp_path / name)
    found = ModelConfiguration.read({"parameters": {"engine_dir": {"string_value": name}}}, tmp_path, "CPU", 0)
    assert found.engine_dir == tmp_path / name


def test_without_engine_dir_or_an_engine_there_the_error_says_so() -> None:
    with pytest.raises(ConfigError, match="no parameter 'engine_dir': write it anew with fly-triton"):
        read({"method": "ngram"})
    with pytest.raises(ConfigError, match="no parameter 'engine_dir'"):
        ModelConfiguration.read({}, NOWHERE, "CPU", 0)
    with pytest.raises(EngineError, match="/nowhere/1/gone: no such engine directory"):
        read({"engine_dir": "gone"})


def test_an_instance_on_a_gpu_has_that_gpu_and_all_cores(engines: dict[str, Path]) -> None:
    groups = [{"kind": "KIND_GPU", "count": 2, "gpus": [0, 3]}]
    parameters = {"engine_dir": str(engines["none"])}
    found = read(parameters, "GPU", 3, instance_group=groups)
    assert ServiceConfig.from_dict(found.settings) == ServiceConfig(device_id=3)
    found = read(parameters | {"num_threads": "2"}, "GPU", 0, instance_group=groups)
    assert ServiceConfig.from_dict(found.settings) == ServiceConfig(device_id=0, num_threads=2)


@pytest.mark.parametrize(
    ("groups", "num_threads"),
    [
        ([], None),
        ([{"kind": "KIND_CPU", "count": 1}], None),
        ([{"kind": "KIND_CPU"}], None),
        ([{"kind": "KIND_CPU", "count": 2}], max(1, CORES // 2)),
        ([{"kind": "KIND_CPU", "count": 1}, {"kind": "KIND_CPU", "count": 1}], max(1, CORES // 2)),
        ([{"kind": "KIND_CPU", "count": 1}, {"kind": "KIND_GPU", "count": 9}], None),
        ([{"kind": "KIND_CPU", "count": 10 * CORES}], 1),
    ],
)
def test_the_instances_on_the_cpu_share_its_cores(
    engines: dict[str, Path], groups: list[dict[str, Any]], num_threads: int | None
) -> None:
    parameters = {"engine_dir": str(engines["none"])}
    found = read(parameters, instance_group=groups)
    assert ServiceConfig.from_dict(found.settings) == ServiceConfig(num_threads=num_threads)
    own = read(parameters | {"num_threads": "7"}, instance_group=groups)
    assert own.settings["num_threads"] == 7


@pytest.mark.parametrize("number", [int, str])
def test_the_queue_policy_is_tritons(engines: dict[str, Path], number: Callable[[int], int | str]) -> None:
    """protobuf writes 64-bit numbers into JSON as text."""

    def queue(**policy: Any) -> tuple[int, float | None, bool]:
        batching = {"dynamic_batching": {"default_queue_policy": policy}}
        found = read({"engine_dir": str(engines["none"])}, **batching)
        return found.settings["max_queue_size"], found.queue_timeout, found.allows_own_timeout

    timeout = {"default_timeout_microseconds": number(1_500_000)}
    assert queue(max_queue_size=12, allow_timeout_override=True, **timeout) == (12, 1.5, True)
    assert queue(**timeout) == (DEFAULT_MAX_QUEUE_SIZE, 1.5, False)
    assert queue(max_queue_size=number(0), default_timeout_microseconds=number(0)) == (
        DEFAULT_MAX_QUEUE_SIZE,
        None,
        False,
    )


@pytest.mark.parametrize("batching", [{}, {"dynamic_batching": {}}, {"dynamic_batching": {"default_queue_policy": {}}}])
def test_without_a_queue_policy_requests_wait_as_long_as_it_takes(engines: dict[str, Path], batching: Any) -> None:
    found = read({"engine_dir": str(engines["none"])}, **batching)
    assert found.settings["max_queue_size"] == DEFAULT_MAX_QUEUE_SIZE
    assert found.queue_timeout is None
    assert not found.allows_own_timeout


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("num_speculative_tokens", "abc", "num_speculative_tokens 'abc': expected a whole number, at least 1"),
        ("num_speculative_tokens", "", "num_speculative_tokens '': expected a whole number"),
        ("num_speculative_tokens", "1.5", "num_speculative_tokens 1.5: expected a whole number"),
        ("num_speculative_tokens", "[4]", r"num_speculative_tokens \[4\]: expected a whole number"),
        ("fly_entropy_threshold", "NaN", "fly_entropy_threshold nan: expected a number >= 0"),
        ("fly_window_size", "-1", "fly_window_size -1"),
        ("method", "eagle", "method 'eagle': expected one of"),
        ("preset", "none", "preset None: expected one of"),
        ("adaptive_draft_length", "yes", "adaptive_draft_length 'yes': expected True or False"),
        ("exclude_input_in_output", "yes", "exclude_input_in_output 'yes': expected true or false"),
        ("exclude_input_in_output", "1", "exclude_input_in_output 1: expected true or false"),
        ("max_batch_size", "abc", "max_batch_size 'abc': expected a whole number, at least 1"),
        ("num_threads", "0", "num_threads 0: expected a whole number, at least 1"),
        ("enable_prefix_caching", "1", "enable_prefix_caching 1: expected True or False"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_in_one_line(
    read_with: Callable[..., ModelConfiguration], name: str, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        ServiceConfig.from_dict(read_with(**{name: text}).settings)
    assert "\n" not in str(refused.value)


def test_a_whole_config_pbtxt_is_read_as_triton_hands_it_over(engines: dict[str, Path], tmp_path: Path) -> None:
    speculative = {"preset": "vllm", "num_speculative_tokens": 5}
    plan = make_plan(
        engines["fly"],
        tmp_path,
        instances=3,
        exclude_input_in_output=False,
        max_queue_size=9,
        queue_timeout=2.5,
        speculative=speculative,
        settings={"max_batch_size": 2},
    )
    handed_over = json.loads(
        json_format.MessageToJson(
            text_format.Parse(plan.config, ModelConfig()),
            preserving_proto_field_name=True,
            always_print_fields_with_no_presence=True,
        )
    )
    found = ModelConfiguration.read(handed_over, plan.model_dir / "1", "CPU", 0)
    settings = ServiceConfig(max_batch_size=2, max_queue_size=9, num_threads=max(1, CORES // 3))
    assert ServiceConfig.from_dict(found.settings) == settings
    assert found.speculative_config == SpeculativeConfig(**speculative)
    assert found == dataclasses.replace(
        found,
        engine_dir=engines["fly"],
        exclude_input_in_output=False,
        queue_timeout=2.5,
        allows_own_timeout=True,
    )
