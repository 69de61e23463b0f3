"""What the API takes: fields of OpenAI's API.

Those that change nothing here are taken. What would change an answer in a way that is not known here is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flexattn_cuda.serve.prompts import Message

MAX_MESSAGES = 256


class Strict(BaseModel):
    """A model without conversions and unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Extension(Strict):
    """What this server adds to OpenAI's API.

    Attributes:
        trace: Send attention maps and selections with every token.
        hr: Let the model see high-resolution tokens; if False, it answers from the low-resolution image alone.
    """

    trace: bool = False
    hr: bool = True


class Request(Strict):
    """Fields that both APIs share. Answers are greedy: there is nothing random to set."""

    model: str
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = Field(None, gt=0, le=1)
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    flexattn: Extension = Extension()

    @model_validator(mode="after")
    def _is_greedy(self) -> Request:
        if self.temperature not in (None, 0):
            raise ValueError(
                f"temperature is {self.temperature:g}, but this server takes the most probable token at every step; "
                "leave it out, or pass 0"
            )
        return self


# ----------------------------------------------------------------------------------------------------- chat completions


class ImageUrl(Strict):
    """Where an image is."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImageUrlPart(Strict):
    """A part of a message: an image."""

    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(Strict):
    """A part of a message: text."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """A message, also as an answer of this server gives it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Annotated[TextPart | ImageUrlPart, Field(discriminator="type")]], Field(min_length=1)]
    name: str | None = None
    refusal: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None
    tool_calls: list[Any] | None = Field(None, max_length=0)

    def as_message(self) -> Message:
        """Return the message with its texts and images apart."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return Message(role, [self.content], [])
        texts = [part.text for part in self.content if isinstance(part, TextPart)]
        return Message(role, texts, [part.image_url.url for part in self.content if isinstance(part, ImageUrlPart)])


class StreamOptions(Strict):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextFormat(Strict):
    """The only format of answers."""

    type: Literal["text"]


class ChatRequest(Request):
    """The body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    seed: int | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    logprobs: Literal[False] | None = None
    response_format: TextFormat | None = None

    @property
    def limit(self) -> int | None:
        """Maximum length of the answer in tokens."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def conversation(self) -> list[Message]:
        """Return the messages."""
        return [message.as_message() for message in self.messages]


# ------------------------------------------------------------------------------------------------------------ responses


class InputText(Strict):
    """A part of an input message: text."""

    type: Literal["input_text"]
    text: str


class OutputText(Strict):
    """A part of an answer of this server, sent back: text."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = Field(None, max_length=0)
    logprobs: list[Any] | None = Field(None, max_length=0)


class InputImage(Strict):
    """A part of an input message: an image."""

    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high"] | None = None


_InputPart = Annotated[InputText | OutputText | InputImage, Field(discriminator="type")]


class InputMessage(Strict):
    """A message, also as an answer of this server gives it."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[_InputPart], Field(min_length=1)]
    id: str | None = None
    status: str | None = None
    phase: str | None = None

    def as_message(self) -> Message:
        """Return the message with its texts and images apart."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return Message(role, [self.content], [])
        texts = [part.text for part in self.content if not isinstance(part, InputImage)]
        return Message(role, texts, [part.image_url for part in self.content if isinstance(part, InputImage)])


class TextOptions(Strict):
    """Options of the text of a response."""

    format: TextFormat | None = None


class ResponsesRequest(Request):
    """The body of POST /v1/responses. Nothing is stored, so an earlier response cannot be continued by its id."""

    input: str | Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    previous_response_id: str | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    text: TextOptions | None = None
    include: list[Any] | None = Field(None, max_length=0)

    @model_validator(mode="after")
    def _continues_nothing(self) -> ResponsesRequest:
        if self.previous_response_id is not None:
            raise ValueError(
                f"previous_response_id is {self.previous_response_id[:100]!r}, but this server stores no responses; "
                "send the whole conversation as input"
            )
        return self

    def conversation(self) -> list[Message]:
        """Return the messages."""
        first = [] if self.instructions is None else [Message("system", [self.instructions], [])]
        if isinstance(self.input, str):
            return [*first, Message("user", [self.input], [])]
        return [*first, *(message.as_message() for message in self.input)]
