"""`LLM`: an engine directory, ready to generate. The synchronous face of the runtime; `AsyncLLM` is the other one."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from fly_trt.errors import FlyError, QueueFullError, RequestError
from fly_trt.outputs import RequestOutput
from fly_trt.params import RequestOutputKind, SamplingParams
from fly_trt.runtime.group import RequestGroup
from fly_trt.service.facade import Facade
from fly_trt.text.chat import ChatMessage
from fly_trt.text.prompts import Prompt


class LLM(Facade):
    """Loads the engines of `engine_dir` and generates text with them.

        with LLM("engines/pair") as llm:
            print(llm.generate("### Instruction:\\n...")[0].outputs[0].text)

    engine_dir: a path, or a LoadedEngines, which several LLMs share. speculative_config: None means the engine
    directory's defaults, a dict changes some of them, a SpeculativeConfig replaces them; method None decodes without
    drafts. settings: the fields of ServiceConfig. Raises EngineError for a directory that cannot be used and
    ConfigError for settings that do not fit it. Any number of threads may use an LLM; their requests share its batch.
    """

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Completes one prompt or any number of them, in flight together; the outputs are in the order of the prompts.

        A prompt is text, to which the tokenizer adds its special tokens unless it begins with them, or
        {"prompt_token_ids": [...]}, taken as it is. `sampling_params` is one for all or one for each. All prompts are
        checked before the first one runs; the RequestError says which one is wrong. Ctrl-C or an error ends all.
        """
        batch: list[Prompt] = (
            [prompts]
            if isinstance(prompts, (str, dict))
            else _listed("prompts", prompts, "text, {'prompt_token_ids': [...]}")
        )
        inbox: SimpleQueue[tuple[int, RequestOutput | FlyError]] = SimpleQueue()
        groups = self._make_groups(batch, sampling_params, inbox)
        outputs: list[RequestOutput | None] = [None] * len(groups)
        waiting = deque(groups)
        num_running = 0
        progress = tqdm(total=len(groups), desc="Processed prompts", disable=not use_tqdm)
        try:
            while waiting or num_running:
                num_running += self._submit_what_fits(waiting, num_running)
                index, output = inbox.get()
                num_running -= 1
                if isinstance(output, FlyError):
                    raise type(output)(_named(index, len(groups), output))
                outputs[index] = output
                progress.update()
        finally:
            progress.close()
            for group in groups:
                if not group.is_done:
                    self._service.thread.abort_group(group)
        return [output for output in outputs if output is not None]

    def chat(
        self,
        messages: Sequence[ChatMessage] | Sequence[Sequence[ChatMessage]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        **template_variables: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation or many, each a list of {"role": ..., "content": ...}, with the model's own chat
        template; chat_template, tools and other `template_variables` are as render_chat has them."""
        is_many = isinstance(messages, Sequence) and messages and not isinstance(messages[0], (dict, str))
        conversations: Any = messages if is_many else [messages]
        prompts: list[Prompt] = [self.render_chat(one, **template_variables) for one in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Completes one prompt and yields an output whenever there is something new, as params.output_kind says; the
        last one is finished. Leaving the iteration early aborts the request."""
        inbox: SimpleQueue[RequestOutput | FlyError] = SimpleQueue()
        group = self._service.make_group(prompt, sampling_params, self._service.new_request_id(), inbox.put)
        self._service.thread.submit([group])
        try:
            while True:
                output = inbox.get()
                if isinstance(output, FlyError):
                    raise output
                yield output
                if output.finished:
                    return
        finally:
            self._service.thread.abort_group(group)

    def abort(self, request_id: str) -> None:
        """Ends a request that is still served; what it has emitted is returned with finish_reason "abort"."""
        self._service.thread.abort(request_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _make_groups(
        self,
        prompts: list[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        inbox: "SimpleQueue[tuple[int, RequestOutput | FlyError]]",
    ) -> list[RequestGroup]:
        is_one = params is None or isinstance(params, SamplingParams)
        each: list[Any] = [params] * len(prompts) if is_one else _listed("sampling_params", params, "SamplingParams")
        if len(each) != len(prompts):
            raise RequestError(
                f"{len(each)} sampling_params for {len(prompts)} prompts: give one, or one for each prompt"
            )
        groups = []
        for index, (prompt, one) in enumerate(zip(prompts, each, strict=True)):

            def sink(output: RequestOutput | FlyError, index: int = index) -> None:
                inbox.put((index, output))

            try:
                request_id = self._service.new_request_id()
                groups.append(
                    self._service.make_group(prompt, one, request_id, sink, output_kind=RequestOutputKind.FINAL_ONLY)
                )
            except RequestError as error:
                raise RequestError(_named(index, len(prompts), error)) from None
        return groups

    def _submit_what_fits(self, waiting: deque[RequestGroup], num_running: int) -> int:
        """Hands over as many groups as the queue takes; an own request that ends makes room for the next."""
        num_submitted = 0
        while waiting:
            try:
                self._service.thread.submit([waiting[0]])
            except QueueFullError:
                if num_running + num_submitted:
                    break
                self._service.thread.wait_for_room(len(waiting[0].requests))  # others hold all places
                continue
            waiting.popleft()
            num_submitted += 1
        return num_submitted


def _listed(name: str, values: Any, expected: str) -> list[Any]:
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes, dict)):
        raise RequestError(f"{name} of type {type(values).__name__}: expected {expected} or a list of them")
    return list(values)


def _named(index: int, num_prompts: int, error: FlyError) -> str:
    return f"prompts[{index}]: {error}" if num_prompts > 1 else str(error)
