"""Retrieve-while-generating: Gen writes, its state at `[Ret]` searches the index, the passage is read, Gen goes on.

Shapes: R rows, C tokens of a chunk, L cached tokens, D hidden size, V vocabulary, H key-value heads, d head size.

Requests share the rows of one key-value cache. Each row keeps a queue of tokens that Gen has still to read: the prompt,
a token that was just sampled, or `<passage> [Cs]` after a retrieval. Nothing is ever read twice.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from cosup.config import UserError
from cosup.index import Hit, Index
from cosup.model import CoSupModel
from cosup.template import Claim, Parser, Reason, Response, Template


@dataclass(frozen=True, slots=True)
class Token:
    """A token was written, or inserted; `text` is what can be shown since the last one, never half a character."""

    text: str
    id: int
    inserted: bool


@dataclass(frozen=True, slots=True)
class Retrieved:
    """The index was searched with the state at `[Ret]`; best first."""

    hits: tuple[Hit, ...]


@dataclass(frozen=True, slots=True)
class Inserted:
    """A passage was put into Gen's context."""

    passage_id: str


@dataclass(frozen=True, slots=True)
class ClaimOpened:
    """What follows rests on this passage."""

    passage_id: str


@dataclass(frozen=True, slots=True)
class ClaimClosed:
    """The claim is the characters from `start` to `end` of the response's text."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event."""

    reason: Reason
    response: Response


Event = Token | Retrieved | Inserted | ClaimOpened | ClaimClosed | Finished


@dataclass(frozen=True, slots=True)
class Options:
    """How to generate; greedily.

    Args:
        max_new_tokens: most tokens that Gen may choose in a response.
        max_retrievals: most retrievals in a response; `[Ret]` can't be chosen after them.
        candidates: how many passages a retrieval reports.
        retrieve_first: whether the response begins with a retrieval, whatever Gen would choose.
        rows: requests that are worked on at once.
    """

    max_new_tokens: int = 128
    max_retrievals: int = 4
    candidates: int = 5
    retrieve_first: bool = False
    rows: int = 16


class Engine:
    """Answers prompts with a model and an index.

    Args:
        model: in evaluation mode.
        index: built by this model.
        options: see `Options`.

    Raises:
        UserError: the index was built by another model.
    """

    def __init__(self, model: CoSupModel, index: Index, options: Options | None = None):
        check_index(model, index)
        self.model, self.index, self.options = model, index, options or Options()

    def generate(
        self, prompts: Sequence[str | Sequence[int]], *, on_progress: Callable[[int], None] = lambda done: None
    ) -> list[Response]:
        """Responses to prompts, in order.

        Args:
            prompts: questions, or ids from `Template.prompt`.
            on_progress: is told how many responses are finished.

        Raises:
            UserError: a prompt is longer than the context.
        """
        responses: dict[int, Response] = {}
        for request, event in self.events(prompts):
            if isinstance(event, Finished):
                responses[request] = event.response
                on_progress(len(responses))
        return [responses[request] for request in range(len(prompts))]

    def stream(self, prompt: str | Sequence[int]) -> Iterator[Event]:
        """The events of one response as they happen; see `generate`."""
        return (event for _, event in self.events([prompt]))

    @torch.inference_mode()
    def events(self, prompts: Sequence[str | Sequence[int]]) -> Iterator[tuple[int, Event]]:
        """The events of many responses, each with the position of its prompt; a prompt starts when a row is free."""
        waiting = deque(enumerate([self._prompt_ids(prompt) for prompt in prompts]))
        batch = _Batch(self)
        while waiting or batch.rows:
            while waiting and len(batch.rows) < self.options.rows:
                batch.admit(*waiting.popleft())
            yield from batch.step()

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        ids = self.model.template.prompt(prompt, task="") if isinstance(prompt, str) else list(prompt)
        if len(ids) + 2 > self.model.context:
            raise UserError(
                f"the prompt has {len(ids):,} tokens, and the model reads at most {self.model.context:,}, its own "
                "answer included: shorten the prompt"
            )
        return ids


def check_index(model: CoSupModel, index: Index) -> None:
    """Raises UserError if the index was built by another model."""
    if index.fingerprint != model.fingerprint:
        raise UserError(
            f"the index was built by another model (fingerprint {index.fingerprint[:12] or 'none'}, this one's is "
            f"{model.fingerprint[:12] or 'none'}); build it again with `cosup index build --model` and this model"
        )


@dataclass(slots=True)
class _Row:
    """One request in progress.

    `queue`: tokens still to be read. `length`: tokens in the cache. `hits`: of each retrieval. `cited`: the passage of
    each retrieval.
    """

    request: int
    queue: list[int]
    parser: Parser
    length: int = 0
    sampled: int = 0
    hits: list[tuple[Hit, ...]] = field(default_factory=list)
    cited: list[Hit] = field(default_factory=list)
    then: list[int] = field(default_factory=list)
    shown: str = ""
    forced: bool = False
    started: float = field(default_factory=time.perf_counter)
    events: list[Event] = field(default_factory=list)
    reason: Reason | None = None


class _Batch:
    """The rows that are worked on together, and their cache."""

    def __init__(self, engine: Engine):
        self.rows: list[_Row] = []
        self._model, self._index, self._options = engine.model, engine.index, engine.options
        self._template: Template = engine.model.template
        self._reader = _Reader(engine.model, engine.options.rows)

    def admit(self, request: int, prompt: list[int]) -> None:
        row = _Row(request, prompt, Parser(self._template))
        if self._options.retrieve_first:
            self._write(row, self._template.ret)
        self.rows.append(row)

    def step(self) -> Iterator[tuple[int, Event]]:
        """Rows with much to read do so in a chunk of their own; then every row reads one token."""
        reading = [slot for slot, row in enumerate(self.rows) if len(row.queue) > 1]
        if reading:
            self._advance(reading)
        single = [slot for slot, row in enumerate(self.rows) if row.reason is None and len(row.queue) == 1]
        if single:
            self._advance(single)
        for row in self.rows:
            yield from ((row.request, event) for event in row.events)
            row.events.clear()
        self._retire()

    def _advance(self, slots: list[int]) -> None:
        rows = [self.rows[slot] for slot in slots]
        states_RD = self._reader.read(slots, [row.length for row in rows], [row.queue for row in rows])
        asking = [i for i, row in enumerate(rows) if row.queue[-1] == self._template.ret]
        for row in rows:
            row.length += len(row.queue)
            row.queue = []
        if asking:
            self._retrieve([rows[i] for i in asking], states_RD[asking])
        writing = [i for i in range(len(rows)) if i not in asking]
        if writing:
            self._sample([rows[i] for i in writing], states_RD[writing])

    def _retrieve(self, rows: list[_Row], states_QD: Tensor) -> None:
        queries_QD = self._model.comparable(states_QD).float().cpu().numpy()
        k = max(self._options.candidates, max(len(row.cited) for row in rows) + 1)
        for row, hits in zip(rows, self._index.search(queries_QD, k), strict=True):
            row.hits.append(tuple(hits[: self._options.candidates]))
            row.events.append(Retrieved(row.hits[-1]))
            self._insert(row, hits)

    def _insert(self, row: _Row, hits: list[Hit]) -> None:
        """The best passage that the response has not read yet, shortened where the context is nearly full."""
        read = {hit.id for hit in row.cited}
        hit = next((hit for hit in hits if hit.id not in read), hits[0])
        room = min(self._template.settings.max_passage_tokens, self._model.context - row.length - _ROOM_FOR_CLAIM)
        if room < 2:
            self._finish(row, "length")
            return
        row.cited.append(hit)
        passage_ids = self._template.inserted(self._index.get([hit.id])[0], max_tokens=room)
        row.events.append(Inserted(hit.id))
        for token in passage_ids:
            self._write(row, token, inserted=True)
        row.events.append(ClaimOpened(hit.id))

    def _sample(self, rows: list[_Row], states_RD: Tensor) -> None:
        logits_RV = self._reader.logits(states_RD)
        for row, logits_V in zip(rows, logits_RV, strict=True):
            if not row.then:
                logits_V[self._banned(row)] = -torch.inf
        chosen: list[int] = logits_RV.argmax(-1).tolist()
        for row, token in zip(rows, chosen, strict=True):
            self._take(row, token)

    def _banned(self, row: _Row) -> list[int]:
        t = self._template
        banned = [t.cs] if row.parser.state == "claim" else [t.cs, t.ce]
        return [*banned, t.ret] if len(row.hits) >= self._options.max_retrievals else banned

    def _take(self, row: _Row, token: int) -> None:
        """Writes a sampled token, or the one that has to come in its place."""
        t = self._template
        if row.then:
            token = row.then.pop(0)
        else:
            row.sampled += 1
            if row.parser.state == "claim" and token in (t.ret, t.eos):  # the claim must be closed first
                row.then, token, row.forced = [token], t.ce, True
        self._write(row, token)
        if token == t.eos:
            self._finish(row, "stop")
        elif row.sampled >= self._options.max_new_tokens or row.length + _ROOM_FOR_CLAIM >= self._model.context:
            self._finish(row, "length")

    def _write(self, row: _Row, token: int, *, inserted: bool = False) -> None:
        claims = len(row.parser.claims)
        row.queue.append(token)
        row.parser.read(token, inserted=inserted)
        row.events.append(Token(self._new_text(row), token, inserted))
        for claim in row.parser.claims[claims:]:
            row.events.append(ClaimClosed(claim.start, claim.end))

    def _new_text(self, row: _Row) -> str:
        text = row.parser.text
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # the character's other bytes are still to come
            return ""
        new, row.shown = text[len(row.shown) :], text
        return new

    def _finish(self, row: _Row, reason: Reason) -> None:
        parsed = row.parser.finish()
        claims = [
            Claim(claim.text, claim.start, claim.end, hit.id, hit.score)
            for claim, hit in zip(parsed.claims, row.cited, strict=True)
        ]
        response = replace(
            parsed,
            claims=tuple(claims),
            well_formed=parsed.well_formed and not row.forced,
            reason=reason,
            retrieved=tuple(tuple(hit.id for hit in hits) for hits in row.hits),
            tokens_read=row.length,
            tokens_sampled=row.sampled,
            seconds=time.perf_counter() - row.started,
        )
        row.reason = reason
        row.events.append(Finished(reason, response))

    def _retire(self) -> None:
        """Frees the rows that are done; the last row moves into the gap, so that rows in use lie together."""
        for slot in reversed(range(len(self.rows))):
            if self.rows[slot].reason is not None:
                last = len(self.rows) - 1
                if slot != last:
                    self._reader.move(last, slot, self.rows[last].length)
                    self.rows[slot] = self.rows[last]
                self.rows.pop()


_ROOM_FOR_CLAIM = 2  # tokens that must still fit the context: one to write, and the end


class _Reader:
    """Feeds chunks of several rows to Gen, each at its own place in the shared cache."""

    def __init__(self, model: CoSupModel, rows: int):
        self._body, self._head = model.gen.base_model, model.gen.get_output_embeddings()
        self._device = model.device
        self._plan = _Plan(rows)
        self._layers = [_RowLayer(self._plan) for _ in range(model.gen.config.num_hidden_layers)]
        self._cache = Cache(layers=list(self._layers))

    def read(self, slots: list[int], starts: list[int], chunks: list[list[int]]) -> Tensor:
        """Last hidden states [R, D] at the last token of each row's chunk."""
        width = max(len(chunk) for chunk in chunks)
        ids_RC = torch.tensor([chunk + [0] * (width - len(chunk)) for chunk in chunks], device=self._device)
        starts_R = torch.tensor(starts, device=self._device)
        lengths_R = torch.tensor([len(chunk) for chunk in chunks], device=self._device)
        steps_C = torch.arange(width, device=self._device)
        # a pad stands at the place of its row's last token, so that no position passes the model's last
        positions_RC = starts_R[:, None] + torch.minimum(steps_C, lengths_R[:, None] - 1)
        self._plan.set(slots, positions_RC, steps_C < lengths_R[:, None])
        columns_L = torch.arange(self._plan.end, device=self._device)
        mask_R1CL = torch.zeros(len(slots), 1, width, self._plan.end, dtype=self._body.dtype, device=self._device)
        hidden = (columns_L > positions_RC[:, :, None])[:, None]
        mask_R1CL.masked_fill_(hidden, torch.finfo(self._body.dtype).min)
        out = self._body(
            input_ids=ids_RC,
            position_ids=positions_RC,
            attention_mask=mask_R1CL,
            past_key_values=self._cache,
            use_cache=True,
        )
        states_RD: Tensor = out.last_hidden_state[torch.arange(len(slots), device=self._device), lengths_R - 1]
        return states_RD

    def logits(self, states_RD: Tensor) -> Tensor:
        """Next-token logits [R, V]."""
        logits_RV: Tensor = self._head(states_RD)
        return logits_RV

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the cached tokens of one row to another."""
        for layer in self._layers:
            layer.move(source, target, length)


class _Plan:
    """Which rows a step feeds, and where in the cache its tokens go; shared by all layers."""

    def __init__(self, rows: int):
        self.rows = rows
        self.end = 0

    def set(self, slots: list[int], positions_RC: Tensor, real_RC: Tensor) -> None:
        first, last = slots[0], slots[-1]
        together = slots == list(range(first, last + 1))
        # rows that lie together are read through a view; a list of rows makes a copy
        self.select: slice | list[int] = slice(first, last + 1) if together else slots
        self.real_RC = real_RC
        self.slots_M = torch.tensor(slots, device=real_RC.device)[:, None].expand_as(real_RC)[real_RC]
        self.columns_M = positions_RC[real_RC]
        self.end = int(positions_RC.max()) + 1


class _RowLayer(CacheLayerMixin):
    """Keys and values of one layer, [rows, H, L, d]: each row filled from the left, without padding or holes."""

    is_sliding = False

    def __init__(self, plan: _Plan):
        super().__init__()  # type: ignore[no-untyped-call]
        self._plan = plan

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes an empty store of the right types."""
        self.keys, self.values = (
            x.new_zeros(self._plan.rows, x.shape[1], 0, x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Puts the step's tokens in their places and returns all keys and values of the step's rows."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, keys = self._store(self.keys, key_states)  # type: ignore[arg-type]
        self.values, values = self._store(self.values, value_states)  # type: ignore[arg-type]
        return keys, values

    def _store(self, held_RHLd: Tensor, new_RHCd: Tensor) -> tuple[Tensor, Tensor]:
        plan = self._plan
        if plan.end > held_RHLd.shape[2]:
            more = max(plan.end, 2 * held_RHLd.shape[2], 64) - held_RHLd.shape[2]
            held_RHLd = torch.nn.functional.pad(held_RHLd, (0, 0, 0, more))
        held_RHLd[plan.slots_M, :, plan.columns_M] = new_RHCd.transpose(1, 2)[plan.real_RC]
        return held_RHLd, held_RHLd[plan.select, :, : plan.end]

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first tokens of one row to another."""
        for states in (self.keys, self.values):
            states[target, :, :length] = states[source, :, :length]  # type: ignore[index]

    def get_seq_length(self) -> int:
        """Tokens of the longest row of the step."""
        return self._plan.end

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the columns that a mask must cover."""
        return self._plan.end, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1
