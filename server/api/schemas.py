"""What clients may send. Every field has bounds; what is not listed here is refused.

Lists stop at their first wrong item (`fail_fast`): the list of all of them could be as long as the
body.

Optional fields accept null, which means "not given". A field that OpenAI or vLLM has and this
server has not is listed with the values that change nothing (see `fields.neutral`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.body_bounds import MAX_VALUES
from server.api.fields import (
    Content,
    LogitBias,
    Prompts,
    Stop,
    TokenId,
    conflict,
    neutral,
)

MAX_N = 16
MAX_LOGPROBS = 20
MAX_MESSAGES = 2048
MAX_FIELDS = 128  # of one object
MAX_OUTPUT_TOKENS = 1 << 24  # beyond any context length; the model's own limit comes later
INT64 = 1 << 63

Name = Annotated[str, Field(min_length=1, max_length=256)]
Flag = bool | None


class Strict(BaseModel):
    """No coercion, no unknown field, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _check_number(cls, value: Any) -> Any:
        """pydantic makes an error of each unknown field."""
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise PydanticCustomError(
                "value", "an object has more than {limit} fields", {"limit": MAX_FIELDS}
            )
        return value


class StreamOptions(Strict):
    """What a stream carries beside the text."""

    include_usage: Flag = None
    continuous_usage_stats: Flag = None
    include_obfuscation: Annotated[Any, neutral(False)] = None


class GenerationRequest(Strict):
    """The fields that completions and chat completions share."""

    model: Name
    stream: Flag = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MAX_OUTPUT_TOKENS)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_OUTPUT_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None  # -1 and 0: off
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias = ()
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: Stop = ()
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True)] | None = None
    include_stop_str_in_output: Flag = None
    ignore_eos: Flag = None
    skip_special_tokens: Flag = None
    user: Annotated[str, Field(max_length=512)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    priority: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None  # lower is sooner

    allowed_token_ids: Annotated[Any, neutral([])] = None
    bad_words: Annotated[Any, neutral([])] = None
    best_of: Annotated[Any, neutral(1)] = None
    guided_json: Annotated[Any, neutral()] = None
    guided_regex: Annotated[Any, neutral()] = None
    length_penalty: Annotated[Any, neutral(1, 1.0)] = None
    logits_processors: Annotated[Any, neutral([])] = None
    metadata: Annotated[Any, neutral({})] = None
    prompt_logprobs: Annotated[Any, neutral()] = None
    response_format: Annotated[Any, neutral({"type": "text"})] = None
    return_token_ids: Annotated[Any, neutral(False)] = None
    return_tokens_as_token_ids: Annotated[Any, neutral(False)] = None
    spaces_between_special_tokens: Annotated[Any, neutral(True)] = None
    structured_outputs: Annotated[Any, neutral()] = None
    truncate_prompt_tokens: Annotated[Any, neutral()] = None
    use_beam_search: Annotated[Any, neutral(False)] = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise conflict("stream_options", "needs stream=true")
        return self

    @property
    def n_choices(self) -> int:
        """Choices per prompt."""
        return self.n or 1

    @property
    def output_limit(self) -> int | None:
        """The most tokens the caller wants, None when nothing was said."""
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with an event that holds the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every event of a stream holds the usage so far."""
        options = self.stream_options
        return bool(options and options.include_usage and options.continuous_usage_stats)


class CompletionRequest(GenerationRequest):
    """Body of ``POST /v1/completions``."""

    prompt: Prompts
    add_special_tokens: Flag = None  # default: yes
    echo: Flag = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    suffix: Annotated[Any, neutral("")] = None

    @model_validator(mode="after")
    def _check_completion(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise conflict("max_tokens", "must be at least 1 unless echo is true")
        return self


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content = None
    name: Annotated[str, Field(max_length=64)] | None = None

    annotations: Annotated[Any, neutral([])] = None
    audio: Annotated[Any, neutral()] = None
    function_call: Annotated[Any, neutral()] = None
    reasoning: Annotated[Any, neutral("")] = None
    reasoning_content: Annotated[Any, neutral("")] = None
    refusal: Annotated[Any, neutral("")] = None
    tool_calls: Annotated[Any, neutral([])] = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None:
            raise conflict("content", "is missing")
        return self

    def as_dict(self) -> dict[str, Any]:
        """Return what a chat template reads."""
        named = {"name": self.name} if self.name is not None else {}
        return {"role": self.role, "content": self.content, **named}


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatInput(Strict):
    """A conversation and where the model goes on."""

    messages: Messages
    add_generation_prompt: Flag = None
    continue_final_message: Flag = None
    add_special_tokens: Flag = None  # default: no, a template has its own

    @model_validator(mode="after")
    def _check_ending(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise conflict("continue_final_message", "excludes add_generation_prompt")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise conflict("continue_final_message", "needs a final message of the assistant")
        return self

    @property
    def generation_prompt(self) -> bool:
        """Whether the template opens the assistant's turn."""
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt


class ChatRequest(GenerationRequest, ChatInput):
    """Body of ``POST /v1/chat/completions``."""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_OUTPUT_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_OUTPUT_TOKENS)] | None = None
    logprobs: Flag = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    audio: Annotated[Any, neutral()] = None
    echo: Annotated[Any, neutral(False)] = None
    function_call: Annotated[Any, neutral("none")] = None
    functions: Annotated[Any, neutral([])] = None
    modalities: Annotated[Any, neutral(["text"])] = None
    parallel_tool_calls: Annotated[Any, neutral(True, False)] = None
    prediction: Annotated[Any, neutral()] = None
    reasoning_effort: Annotated[Any, neutral("none")] = None
    service_tier: Annotated[Any, neutral("auto", "default")] = None
    store: Annotated[Any, neutral(False)] = None
    tool_choice: Annotated[Any, neutral("none", "auto")] = None
    tools: Annotated[Any, neutral([])] = None
    verbosity: Annotated[Any, neutral("medium")] = None
    web_search_options: Annotated[Any, neutral()] = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise conflict("top_logprobs", "needs logprobs=true")
        return self

    @property
    def output_limit(self) -> int | None:
        """`max_completion_tokens`, the newer name, wins over `max_tokens`."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer


class TokenizeRequest(Strict):
    """Body of ``POST /tokenize``: a prompt, or a conversation."""

    model: Name
    prompt: str | None = None
    messages: Messages | None = None
    add_generation_prompt: Flag = None
    continue_final_message: Flag = None
    add_special_tokens: Flag = None  # default: yes for a prompt, no for a conversation
    return_token_strs: Flag = None

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise conflict("prompt", "give either prompt or messages")
        return self

    @property
    def chat(self) -> ChatInput | None:
        """The conversation, None when a prompt was given. Raises ValidationError."""
        if self.messages is None:
            return None
        return ChatInput(
            messages=self.messages,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            add_special_tokens=self.add_special_tokens,
        )


class DetokenizeRequest(Strict):
    """Body of ``POST /detokenize``."""

    model: Name
    tokens: Annotated[list[TokenId], Field(max_length=MAX_VALUES, fail_fast=True)]
