"""/v1/completions: one prompt or several, as text or tokens, each completed n times."""

from collections.abc import Sequence
from typing import Any

from fly_trt.errors import RequestError
from fly_trt.outputs import CompletionOutput, RequestOutput
from fly_trt.params import SamplingParams
from fly_trt.serving.openai.answers.generation import Shared, Writer
from fly_trt.serving.openai.answers.logprobs import CompletionLogprobs, prompt_logprobs_object
from fly_trt.serving.openai.pool import PooledEngine
from fly_trt.serving.openai.requests.protocol import CompletionRequest
from fly_trt.serving.openai.requests.sampling import completion_params
from fly_trt.text.prompts import Prompt


def read_prompts(prompt: Any) -> list[Prompt]:
    """A text, token ids, or a list of one of them."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [{"prompt_token_ids": prompt}]
    return [each if isinstance(each, str) else {"prompt_token_ids": each} for each in prompt]


def check_number(prompts: Sequence[Prompt], params: SamplingParams, llm: PooledEngine) -> None:
    """Raises RequestError for more than an idle engine has room for."""
    limit = llm.sizes.max_queue_size
    if len(prompts) * params.n > limit:
        raise RequestError(
            f"prompt: {len(prompts)} with n {params.n} are more than max_queue_size {limit}: send several requests"
        )


def read_params(body: CompletionRequest, shared: Shared) -> SamplingParams:
    """With max_tokens 0 the prompt alone is looked at, for which the runtime makes one token that nobody sees."""
    more = shared.sampling(body)
    if body.echo and body.logprobs is not None:
        more["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    if body.max_tokens == 0:
        if not body.echo or body.stream:
            raise RequestError("max_tokens 0: expected at least 1, or echo without stream")
        more["max_tokens"] = 1
    return completion_params(body, shared.defaults, **more)


class CompletionWriter(Writer):
    object_name = chunk_name = "text_completion"
    body: CompletionRequest

    def __init__(
        self,
        llm: PooledEngine,
        shared: Shared,
        body: CompletionRequest,
        params: SamplingParams,
        answer_id: str,
        model: str,
    ) -> None:
        super().__init__(llm, shared, body, params, answer_id, model)
        self._logprobs: dict[int, CompletionLogprobs] = {}
        self._is_prompt_alone = body.max_tokens == 0

    def choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        return self._choice(index, output, completion, is_first=True)

    def chunks(
        self, index: int, output: RequestOutput, completion: CompletionOutput, *, is_first: bool
    ) -> list[dict[str, Any]]:
        if not (completion.token_ids or completion.text or completion.finish_reason):
            return []
        return [self._choice(index, output, completion, is_first=is_first)]

    def usage(self, metrics: Any) -> dict[str, Any]:
        found = super().usage(metrics)
        if self._is_prompt_alone:
            nothing = dict.fromkeys(found["completion_tokens_details"], 0)
            found |= {"completion_tokens": 0, "completion_tokens_details": nothing}
            found["total_tokens"] = found["prompt_tokens"]
        return found

    def _choice(
        self, index: int, output: RequestOutput, completion: CompletionOutput, *, is_first: bool
    ) -> dict[str, Any]:
        if self._is_prompt_alone:
            completion = CompletionOutput(
                completion.index, "", [], None if completion.logprobs is None else [], "length", trace=[]
            )
        echoed = self._echoed(output) if is_first and self.body.echo else ""
        choice: dict[str, Any] = {
            "index": index,
            "text": echoed + completion.text,
            "logprobs": self._logprobs_of(index, output, completion, len(echoed), is_first=is_first),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if is_first and self.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs_object(output.prompt_logprobs)
        if is_first and self.body.return_token_ids:
            choice["prompt_token_ids"] = output.prompt_token_ids
        return choice | self.additions(completion.token_ids, completion)

    def _echoed(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        text: str = self.llm.tokenizer.decode(
            output.prompt_token_ids, skip_special_tokens=self.params.skip_special_tokens
        )
        return text

    def _logprobs_of(
        self, index: int, output: RequestOutput, completion: CompletionOutput, num_echoed: int, *, is_first: bool
    ) -> dict[str, Any] | None:
        if self.params.logprobs is None:
            return None
        if is_first:
            self._logprobs[index] = CompletionLogprobs(
                self.shared.reader,
                self.params.logprobs,
                as_token_ids=bool(self.body.return_tokens_as_token_ids),
                skips_special=self.params.skip_special_tokens,
            )
        lists = self._logprobs[index]
        found: dict[str, Any] = {}
        if is_first and self.body.echo:
            found = lists.of(output.prompt_token_ids, output.prompt_logprobs or ())
            lists.begin_at(num_echoed)
        own = lists.of(completion.token_ids, completion.logprobs or ())
        return {name: found[name] + values for name, values in own.items()} if found else own
