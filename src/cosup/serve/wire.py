"""What goes over the wire: requests and answers of the OpenAI form, and the additions of cosup."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Finite = Field(allow_inf_nan=False)


class _In(BaseModel):
    """Fields of the OpenAI form that make no difference here are let through."""

    model_config = ConfigDict(extra="ignore", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _valid_text(cls, data: Any) -> Any:
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError):
            raise ValueError("the text holds half of a surrogate pair, or is nested too deeply") from None
        return data


class TextPart(_In):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_In):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """Its parts as one text."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class StreamOptions(_In):
    """Of a stream."""

    include_usage: bool = False


class Extras(BaseModel):
    """What the OpenAI form has no field for; see `cosup.engine.Options`. What is left out is as the server has it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    task: str = ""
    mode: Literal["cosup", "static", "none"] = "cosup"
    retrieve_first: bool = False
    max_retrievals: Annotated[int, Field(ge=0, le=64)] = 4
    min_score: Annotated[float, Finite] | None = None
    candidates: Annotated[int, Field(ge=1, le=100)] = 5
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    forget_passages: bool = False
    quote: bool = False
    statements: bool = False
    hybrid: Annotated[float, Field(ge=0), Finite] = 0.0
    events: bool = False


class ChatRequest(_In):
    """`POST /v1/chat/completions`. Without `temperature` the likeliest token is always taken."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    cosup: Extras = Extras()


class EmbeddingRequest(_In):
    """`POST /v1/embeddings`: texts as passages are embedded, by Emb_seq."""

    model: str
    input: (
        Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    )
    encoding_format: Literal["float", "base64"] | None = None


class SearchRequest(_In):
    """`POST /v1/search`: forced retrieval with a question."""

    query: Annotated[str, Field(min_length=1)]
    top: Annotated[int, Field(ge=1, le=100)] = 5
    task: str = ""
    hybrid: Annotated[float, Field(ge=0), Finite] | None = None


class PassageForm(BaseModel):
    """A passage."""

    model_config = ConfigDict(extra="forbid", strict=True)
    id: Annotated[str, Field(min_length=1, max_length=500)]
    text: Annotated[str, Field(min_length=1)]
    title: str = ""
    meta: dict[str, Any] = {}

    @field_validator("meta")
    @classmethod
    def _plain(cls, meta: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(meta, allow_nan=False, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            raise ValueError("meta must be finite numbers, valid text and lists and objects of them") from None
        return meta


class AddRequest(_In):
    """`POST /v1/passages`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    passages: Annotated[list[PassageForm], Field(min_length=1)]


class Added(BaseModel):
    """How many passages were added, and how many there are now."""

    added: int
    count: int


class Removed(BaseModel):
    """A passage was removed."""

    id: str
    deleted: Literal[True] = True


class FoundPassage(PassageForm):
    """A passage and its score."""

    score: float


class SearchResult(BaseModel):
    """Best first."""

    data: list[FoundPassage]


class UrlCitation(BaseModel):
    """A claim's characters in the content, and the passage that it rests on."""

    start_index: int
    end_index: int
    title: str
    url: str
    passage_id: str
    score: float


class Annotation(BaseModel):
    """A citation in the OpenAI form. `url` is empty where the passage names no http address."""

    type: Literal["url_citation"] = "url_citation"
    url_citation: UrlCitation


class Usage(BaseModel):
    """Tokens; `completion_tokens` are those that the model chose, without inserted passages."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Candidate(BaseModel):
    """A passage that a retrieval found."""

    id: str
    title: str
    score: float


class RetrievalEvent(BaseModel):
    """A retrieval; `position` is how many characters of content stood before it."""

    type: Literal["retrieval"] = "retrieval"
    position: int
    found: bool
    candidates: list[Candidate]


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    annotations: list[Annotation] = []


class Choice(BaseModel):
    """The only one."""

    index: Literal[0] = 0
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class Completion(BaseModel):
    """A whole answer; `cosup` holds the retrievals if they were asked for."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    cosup: list[RetrievalEvent] | None = None


class Embedding(BaseModel):
    """A vector, as numbers or as base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """In the order of the input."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ModelCard(BaseModel):
    """A model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "cosup"


class Models(BaseModel):
    """The only one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorBody(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """An error in the OpenAI form."""

    error: ErrorBody
