"""`LLM`: an engine directory, ready to generate."""

import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict

import numpy as np
from tqdm import tqdm

from fly_trt.drafting import Drafter, Lookup, ModelDrafter, NgramDrafter
from fly_trt.engines import Engine, load_engine
from fly_trt.errors import ConfigError, RequestError
from fly_trt.manifest import Manifest, read_manifest
from fly_trt.outputs import RequestOutput
from fly_trt.params import AcceptanceParams, SamplingParams, SpeculativeConfig
from fly_trt.runtime.loop import GenerationLoop
from fly_trt.runtime.request import Request
from fly_trt.sequence import TokenSequence
from fly_trt.tokenizer import Detokenizer, load_tokenizer


class TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


Prompt = str | TokensPrompt


class LLM:
    """Loads the engines of `engine_dir` and generates text with them.

        with LLM("engines/pair") as llm:
            print(llm.generate("### Instruction:\\n...")[0].outputs[0].text)

    speculative_config: None means the engine directory's defaults, a dict changes some of them, a SpeculativeConfig
    replaces them; method None decodes without drafts. num_threads: CPU threads, shared by all engines of the process;
    None means all cores. verify_hashes: check every file against the manifest's sha256 first. Raises EngineError for a
    directory that cannot be used and ConfigError for settings that do not fit it. One thread may use an LLM at a time.
    """

    def __init__(
        self,
        engine_dir: str | os.PathLike[str],
        *,
        speculative_config: SpeculativeConfig | Mapping[str, Any] | None = None,
        num_threads: int | None = None,
        verify_hashes: bool = False,
    ) -> None:
        if num_threads is not None and num_threads < 1:
            raise ConfigError(f"num_threads {num_threads}: expected at least 1, or None for all cores")
        directory = Path(engine_dir).expanduser()
        self.manifest: Manifest = read_manifest(directory, verify_hashes=verify_hashes)
        if not isinstance(speculative_config, SpeculativeConfig):
            speculative_config = resolve_speculative_config(self.manifest, speculative_config or {})
        self.speculative_config: SpeculativeConfig = speculative_config
        self._check_config()
        self.tokenizer = load_tokenizer(directory)
        self._engines: list[Engine] = []
        self._request_ids = itertools.count()
        target = self._load(directory, "target", num_threads)
        self._target_info = target.info
        drafter = self._make_drafter(directory, num_threads)
        self._loop = GenerationLoop(target, drafter, self.speculative_config.num_speculative_tokens, num_slots=1)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Completes one prompt or many; the outputs are in the order of the prompts.

        A prompt is text or {"prompt_token_ids": [...]}. `sampling_params` is one for all or one for each. All prompts
        are checked before the first one runs; the RequestError says which one is wrong.
        """
        batch = [prompts] if isinstance(prompts, (str, dict)) else list(prompts)
        requests = self._make_requests(batch, sampling_params)
        progress = tqdm(total=len(requests), desc="Processed prompts", disable=not use_tqdm)
        try:
            for request in requests:
                self._loop.add(request)
            pending = set(requests)
            while pending:
                finished = {request for request in self._step() if request.is_finished} & pending
                pending -= finished
                progress.update(len(finished))
        finally:
            progress.close()
            self._abort(requests)
        return [request.output() for request in requests]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Completes one prompt and yields the output so far after every step; the last one is finished. Leaving the
        iteration early aborts the request."""
        (request,) = self._make_requests([prompt], sampling_params)
        self._loop.add(request)
        num_seen = 0
        try:
            while not request.is_finished or len(request.output_token_ids) > num_seen:
                if not request.is_finished:
                    self._step()
                if len(request.output_token_ids) > num_seen:
                    num_seen = len(request.output_token_ids)
                    yield request.output()
        finally:
            self._abort([request])

    def shutdown(self) -> None:
        """Releases the engines. Safe to call twice."""
        while self._engines:
            self._engines.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _step(self) -> list[Request]:
        self._check_open()
        return self._loop.step()

    def _check_open(self) -> None:
        if not self._engines:
            raise ConfigError("this LLM was shut down: make a new one")

    def _abort(self, requests: list[Request]) -> None:
        for request in requests:
            self._loop.abort(request)

    def _load(self, directory: Path, role: str, num_threads: int | None) -> Engine:
        model = getattr(self.manifest, role)
        engine = load_engine(directory, self.manifest, model, num_slots=1, num_threads=num_threads)
        self._engines.append(engine)
        return engine

    def _make_drafter(self, directory: Path, num_threads: int | None) -> Drafter | None:
        config = self.speculative_config
        if config.method is None:
            return None
        if config.method == "ngram":
            return NgramDrafter(config.prompt_lookup_max, config.prompt_lookup_min)
        lookup = None
        if config.method == "multi_level":
            lookup = Lookup(config.prompt_lookup_max, config.prompt_lookup_min, config.prompt_lookup_num_tokens)
        draft = self._load(directory, "draft", num_threads)
        return ModelDrafter(draft, self.manifest.target.vocab_size, lookup)

    def _check_config(self) -> None:
        config, manifest = self.speculative_config, self.manifest
        if config.method in ("multi_level", "draft_model") and manifest.draft is None:
            raise ConfigError(
                f"method {config.method!r} needs a draft model and {manifest.name} was built without one: "
                "use method='ngram' or rebuild with --draft"
            )
        if config.method is not None and config.num_speculative_tokens > manifest.limits.max_draft_len:
            raise ConfigError(
                f"num_speculative_tokens {config.num_speculative_tokens}: built for max_draft_len "
                f"{manifest.limits.max_draft_len}: rebuild with --max-draft-len {config.num_speculative_tokens}"
            )
        config.acceptance_params().policy(manifest.target.vocab_size, manifest.head.entropy_top_k)

    def _make_requests(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Request]:
        self._check_open()
        each = (
            [params or SamplingParams()] * len(prompts)
            if params is None or isinstance(params, SamplingParams)
            else params
        )
        if len(each) != len(prompts):
            raise RequestError(
                f"{len(each)} sampling_params for {len(prompts)} prompts: give one, or one for each prompt"
            )
        requests = []
        for index, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
            try:
                requests.append(self._make_request(prompt, one))
            except RequestError as error:
                raise (RequestError(f"prompts[{index}]: {error}") if len(prompts) > 1 else error) from None
        return requests

    def _make_request(self, prompt: Prompt, params: SamplingParams) -> Request:
        token_ids = self._tokenize(prompt)
        room = self._target_info.max_seq_len - len(token_ids)
        if room < 1:
            raise RequestError(
                f"prompt has {len(token_ids)} tokens, the engine's max_seq_len is {self._target_info.max_seq_len} "
                "with the output: shorten it or rebuild with a larger --max-seq-len"
            )
        acceptance = (params.acceptance or AcceptanceParams()).over(self.speculative_config.acceptance_params())
        own_stops = frozenset(params.stop_token_ids or ())
        unknown = sorted(token for token in own_stops if not 0 <= token < self._target_info.vocab_size)
        if unknown:
            raise RequestError(
                f"stop_token_ids: {unknown[0]} is not a token id, expected 0 to {self._target_info.vocab_size - 1}"
            )
        model_stops = frozenset() if params.ignore_eos else self._target_info.stop_token_ids
        request = Request(
            request_id=str(next(self._request_ids)),
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=token_ids,
            params=params,
            policy=acceptance.policy(self._target_info.vocab_size, self._target_info.entropy_top_k),
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            end_token_ids=own_stops | model_stops,
            stop_token_ids=own_stops - self._target_info.stop_token_ids,
            detokenizer=Detokenizer(
                self.tokenizer,
                token_ids,
                stop_strings=params.stop_strings,
                include_stop_string=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
            ),
            sequence=TokenSequence(token_ids),
        )
        request.metrics.num_prompt_tokens = len(token_ids)
        return request

    def _tokenize(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("the prompt is empty: give at least one character or token")
            return list(self.tokenizer.encode(prompt).ids)
        token_ids: Any = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
        if token_ids is None:
            raise RequestError(
                f"prompt of type {type(prompt).__name__}: expected text or {{'prompt_token_ids': [...]}}"
            )
        try:
            array = np.asarray(token_ids)
        except ValueError:
            array = np.empty(0, object)
        if array.size == 0:
            raise RequestError("the prompt is empty: give at least one character or token")
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise RequestError("prompt_token_ids: expected a flat list of whole numbers")
        vocab_size = self._target_info.vocab_size
        outside = array[(array < 0) | (array >= vocab_size)]
        if len(outside):
            raise RequestError(f"prompt_token_ids: {outside[0]} is not a token id, expected 0 to {vocab_size - 1}")
        return [int(token) for token in array]


def resolve_speculative_config(manifest: Manifest, overrides: Mapping[str, Any]) -> SpeculativeConfig:
    """The engine's defaults with `overrides` on top. Without a draft model the default is n-gram lookup, and the
    default number of draft tokens is at most the engine's max_draft_len."""
    limit = manifest.limits.max_draft_len
    settings = dict(manifest.speculative)
    if overrides.get("preset") not in (None, settings.get("preset", "reference")):
        for name in ("fly_window_size", "fly_entropy_threshold"):  # in the unit of the other preset
            settings.pop(name, None)
    if manifest.draft is None and settings.get("method", "multi_level") in ("multi_level", "draft_model"):
        settings["method"] = "ngram"
    if limit == 0:
        settings["method"] = None
    wanted = settings.get("num_speculative_tokens", SpeculativeConfig().num_speculative_tokens)
    settings["num_speculative_tokens"] = max(1, min(wanted, limit))
    config = SpeculativeConfig.from_dict(settings | dict(overrides))
    names = [f.name for f in dataclasses.fields(AcceptanceParams)]
    asked = AcceptanceParams(**{name: overrides[name] for name in names if name in overrides})
    asked.over(config.acceptance_params())  # refuses a FLy setting that would have no effect
    return config
