"""Events of the engine as answers of the OpenAI form, whole and as a stream."""

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from cosup.data import Passage
from cosup.engine import ClaimClosed, Finished, Token
from cosup.serve import wire
from cosup.serve.worker import Cited, FailedError, Found, Item
from cosup.template import Claim, Response


class Answer:
    """One answer as it grows.

    Args:
        model: the name that the client knows.
        prompt_tokens: of the prompt.
        events: whether retrievals are told.
    """

    def __init__(self, model: str, *, prompt_tokens: int, events: bool):
        self.id, self.created, self.model = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model
        self.retrievals: list[wire.RetrievalEvent] = []
        self.response: Response | None = None
        self._prompt_tokens, self._events = prompt_tokens, events
        self._passages: dict[str, Passage] = {}
        self._sent, self._annotated = 0, 0
        self._cited: list[Cited] = []
        self._closed: list[ClaimClosed] = []

    def take(self, items: Sequence[Item]) -> Iterator[dict[str, Any]]:
        """The chunks that a stream gets for these items. Raises FailedError if the engine did."""
        for item in items:
            if isinstance(item, Token) and item.text:
                self._sent += len(item.text)
                yield self._chunk({"content": item.text})
            elif isinstance(item, Found):
                yield from self._retrieved(item)
            elif isinstance(item, Cited):
                self._cited.append(item)
                self._passages[item.passage.id] = item.passage
            elif isinstance(item, ClaimClosed):
                self._closed.append(item)
            elif isinstance(item, Finished):
                yield from self._finish(item.response)
                return
            yield from self._citations()

    def first(self) -> dict[str, Any]:
        """The chunk that opens a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def usage(self) -> wire.Usage:
        """Tokens of the finished answer."""
        assert self.response is not None
        written = self.response.tokens_sampled
        return wire.Usage(
            prompt_tokens=self._prompt_tokens, completion_tokens=written, total_tokens=self._prompt_tokens + written
        )

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream that asked for it."""
        return {**self._head(), "choices": [], "usage": self.usage().model_dump()}

    def whole(self) -> wire.Completion:
        """The finished answer."""
        assert self.response is not None
        message = wire.AnswerMessage(
            content=self.response.text, annotations=[self._annotation(claim) for claim in self.response.claims]
        )
        return wire.Completion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[wire.Choice(message=message, finish_reason=_reason(self.response))],
            usage=self.usage(),
            cosup=self.retrievals if self._events else None,
        )

    def _retrieved(self, item: Found) -> Iterator[dict[str, Any]]:
        by_id = {passage.id: passage for passage in item.passages}
        told = wire.RetrievalEvent(
            position=self._sent,
            found=item.event.found,
            candidates=[
                wire.Candidate(id=hit.id, title=by_id[hit.id].title, score=hit.score) for hit in item.event.hits
            ],
        )
        self.retrievals.append(told)
        if self._events:
            yield {**self._chunk({}), "cosup": told.model_dump()}

    def _citations(self) -> Iterator[dict[str, Any]]:
        """Those whose claim has been sent in full."""
        while self._annotated < len(self._closed) and self._closed[self._annotated].end <= self._sent:
            closed, cited = self._closed[self._annotated], self._cited[self._annotated]
            yield self._cite(Claim("", closed.start, closed.end, cited.passage.id, cited.score))

    def _finish(self, response: Response) -> Iterator[dict[str, Any]]:
        self.response = response
        if response.reason == "error":
            raise FailedError(response.error)
        if rest := response.text[self._sent :]:  # half a character, which the engine keeps back to the end
            yield self._chunk({"content": rest})
        for claim in response.claims[self._annotated :]:
            yield self._cite(claim)
        yield self._chunk({}, finish_reason=_reason(response))

    def _cite(self, claim: Claim) -> dict[str, Any]:
        self._annotated += 1
        return self._chunk({"annotations": [self._annotation(claim).model_dump()]})

    def _annotation(self, claim: Claim) -> wire.Annotation:
        passage = self._passages[claim.passage]
        citation = wire.UrlCitation(
            start_index=claim.start,
            end_index=claim.end,
            title=passage.title,
            url=url_of(passage),
            passage_id=claim.passage,
            score=claim.score,
        )
        return wire.Annotation(url_citation=citation)

    def _chunk(self, delta: dict[str, Any], *, finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return {**self._head(), "choices": [choice]}

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model}


def url_of(passage: Passage) -> str:
    """The web address that a passage names, or else nothing that a browser would run: empty."""
    url = passage.meta.get("url", "")
    return url if isinstance(url, str) and url.startswith(("https://", "http://")) else ""


def _reason(response: Response) -> Literal["stop", "length"]:
    return "length" if response.reason == "length" else "stop"
