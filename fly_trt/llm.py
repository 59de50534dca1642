"""`LLM`: an engine directory, ready to generate. The synchronous face of the runtime; `AsyncLLM` is the other one."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from fly_trt.errors import RequestError
from fly_trt.outputs import RequestOutput
from fly_trt.params import RequestOutputKind, SamplingParams
from fly_trt.service.facade import Facade
from fly_trt.service.inbox import Inbox, RequestHandle
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
        outputs: dict[str, RequestOutput] = {}
        with self._service.open_inbox() as inbox:
            handles = self._prepare(inbox, batch, sampling_params)
            waiting = deque(handles)
            with tqdm(total=len(handles), desc="Processed prompts", disable=not use_tqdm) as progress:
                while waiting or inbox.num_open:
                    inbox.submit_what_fits(waiting)
                    arrival = inbox.get()
                    outputs[arrival.handle.request_id] = arrival.output
                    progress.update()
        return [outputs[handle.request_id] for handle in handles]

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
        with self._service.open_inbox() as inbox:
            inbox.submit(inbox.prepare(prompt, sampling_params))
            while inbox.num_open:
                yield inbox.get().output

    def abort(self, request_id: str) -> None:
        """Ends a request that is still served; what it has emitted is returned with finish_reason "abort"."""
        self._service.abort(request_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _prepare(
        self, inbox: Inbox, prompts: list[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[RequestHandle]:
        is_one = params is None or isinstance(params, SamplingParams)
        each: list[Any] = [params] * len(prompts) if is_one else _listed("sampling_params", params, "SamplingParams")
        if len(each) != len(prompts):
            raise RequestError(
                f"{len(each)} sampling_params for {len(prompts)} prompts: give one, or one for each prompt"
            )
        names = [f"prompts[{index}]" if len(prompts) > 1 else "" for index in range(len(prompts))]
        return [
            inbox.prepare(prompt, one, name=name, output_kind=RequestOutputKind.FINAL_ONLY)
            for prompt, one, name in zip(prompts, each, names, strict=True)
        ]


def _listed(name: str, values: Any, expected: str) -> list[Any]:
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes, dict)):
        raise RequestError(f"{name} of type {type(values).__name__}: expected {expected} or a list of them")
    return list(values)
