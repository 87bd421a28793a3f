"""Rows of one cache that requests join and leave, one step after the other.

Shapes: R rows that finished reading in a step, Q rows that search, D hidden size.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cosup.config import UserError
from cosup.data import Passage
from cosup.engine.events import Event
from cosup.engine.options import Options
from cosup.engine.reader import Chunk, Gen, Reader
from cosup.engine.row import ROOM_FOR_CLAIM, Row
from cosup.engine.sampling import choose
from cosup.index import Hit, HybridIndex, Index
from cosup.model import CoSupModel

TOKENS_PER_STEP = 512
"""Most tokens of prompts and passages that one step reads, so that rows that write don't wait long for the others."""


CHEAP_TOKENS = 8
"""So many tokens pass through Gen in hardly more time than one: its weights have to be fetched anyway."""


@dataclass(slots=True)
class Seconds:
    """Where the time of a session went.

    Args:
        reading: in steps in which a prompt or a passage was read; tokens written beside it are in it.
        writing: in steps in which every row read the one token that it had written.
        searching: for passages, and fetching them.
        sampling: the head, and choosing tokens.
        total: all steps, what stands between the others included.
    """

    reading: float = 0.0
    writing: float = 0.0
    searching: float = 0.0
    sampling: float = 0.0
    total: float = 0.0


class Session:
    """Answers requests that come and go. Not thread-safe: one thread drives it.

    Args:
        model: in evaluation mode.
        index: built by this model.
        options: of requests that bring none; its `rows` are the session's.
        gen: of this model, where it was made before.

    Attributes:
        seconds: where the time went so far.
    """

    def __init__(self, model: CoSupModel, index: Index, options: Options, *, gen: Gen | None = None):
        self.seconds = Seconds()
        self._model, self._index, self._options = model, HybridIndex.of(index), options
        self._limit = model.context
        self._reader = Reader(gen or Gen.of(model), options.rows)
        self._numbers = itertools.count()
        self._waiting: dict[int, tuple[list[int], Options]] = {}
        self._rows: list[Row | None] = [None] * options.rows
        # ids whose keys and values lie in each row of the cache, also after its request has left
        self._cached: list[list[int]] = [[] for _ in range(options.rows)]

    @property
    def active(self) -> int:
        """Rows in use."""
        return sum(row is not None for row in self._rows)

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    def submit(self, prompt: str | Sequence[int], *, options: Options | None = None) -> int:
        """Takes a request, which begins when a row is free.

        Args:
            prompt: a question, or ids from `Template.prompt` or `Template.chat`.
            options: of this request; those of the session without.

        Returns:
            Its number, which its events come with.

        Raises:
            UserError: the prompt is empty, or longer than the context.
        """
        ids = self._model.template.prompt(prompt, task="") if isinstance(prompt, str) else list(prompt)
        if not ids or ids == [self._model.template.ret]:
            raise UserError("the prompt is empty; ask something")
        if len(ids) + ROOM_FOR_CLAIM > self._limit:
            raise UserError(
                f"the prompt has {len(ids):,} tokens, and the model reads at most {self._limit:,}, its own "
                "answer included: shorten the prompt"
            )
        number = next(self._numbers)
        self._waiting[number] = ids, (options or self._options).settled(self._model.settings.answers)
        return number

    def cancel(self, request: int) -> None:
        """Ends a request without a further event and frees its row; nothing happens if it has ended."""
        self._waiting.pop(request, None)
        for slot, row in enumerate(self._rows):
            if row is not None and row.request == request:
                self._free(slot, row)

    def step(self) -> list[tuple[int, Event]]:
        """Every row goes on by a token, a piece of a prompt, or a passage.

        Returns:
            What happened, each event with the number of its request. A step can pass without one; all is done when
            neither a row is `active` nor a request `waiting`.
        """
        started = time.perf_counter()
        with torch.inference_mode():
            self._admit()
            if self.active:
                self._advance()
        events = [(row.request, event) for row in self._rows if row is not None for event in row.events]
        for slot, row in enumerate(self._rows):
            if row is not None:
                row.events.clear()
                if row.ended:
                    self._free(slot, row)
        self.seconds.total += time.perf_counter() - started
        return events

    def _admit(self) -> None:
        for slot in range(len(self._rows)):
            if not self._waiting:
                break
            if self._rows[slot] is None:
                number = next(iter(self._waiting))
                prompt, options = self._waiting.pop(number)
                row = Row(number, prompt, options, template=self._model.template, limit=self._limit)
                self._share(slot, row)
                self._rows[slot] = row
        self._close_gaps()

    def _share(self, slot: int, row: Row) -> None:
        """Takes over what some row of the cache has read of the same beginning, such as an instruction."""
        lengths = [_common(self._held(other), row.context) for other in range(len(self._rows))]
        source = max(range(len(lengths)), key=lambda other: (lengths[other], other == slot))
        length = min(lengths[source], len(row.context) - 1)  # the last token is read: its state is needed
        if length <= 0:
            return
        if source != slot:
            self._reader.copy(source, slot, length)
        row.read(length)

    def _held(self, slot: int) -> list[int]:
        row = self._rows[slot]
        return self._cached[slot] if row is None else row.context[: row.length]

    def _close_gaps(self) -> None:
        """Rows in use lie together, so that they attend together: the last one moves into the first gap."""
        for gap in range(self.active):
            if self._rows[gap] is not None:
                continue
            last = max(slot for slot, row in enumerate(self._rows) if row is not None)
            row = self._row(last)
            self._reader.copy(last, gap, row.length)
            self._free(last, row)
            self._rows[gap] = row

    def _free(self, slot: int, row: Row) -> None:
        self._cached[slot] = row.context[: row.length]
        self._rows[slot] = None

    def _advance(self) -> None:
        """One pass through Gen, and what follows from it for the rows that have read all they had to."""
        chunks = self._chunks()
        long = any(len(chunk.ids) > chunk.wanted for chunk in chunks)
        with self._timing("reading" if long else "writing"):
            states_WD = self._reader.read(chunks)
        for chunk in chunks:
            self._row(chunk.slot).read(len(chunk.ids) - chunk.wanted + 1)
        pairs = list(zip(chunks, states_WD.split([chunk.wanted for chunk in chunks]), strict=True))
        asking = [(self._row(chunk.slot), states) for chunk, states in pairs if self._row(chunk.slot).asks]
        writing = [pair for pair in pairs if not self._row(pair[0].slot).asks and not self._row(pair[0].slot).unread]
        if asking:
            with self._timing("searching"):
                self._retrieve([row for row, _ in asking], torch.cat([states for _, states in asking]))
        if writing:
            with self._timing("sampling"):
                self._write([chunk for chunk, _ in writing], torch.cat([states for _, states in writing]))

    def _row(self, slot: int) -> Row:
        row = self._rows[slot]
        assert row is not None
        return row

    def _chunks(self) -> list[Chunk]:
        """What each row reads now; the first rows come first where there is too much for one step."""
        chunks, left = [], TOKENS_PER_STEP
        ahead = min(self._options.guesses, CHEAP_TOKENS // self.active - 1)
        for slot, row in enumerate(self._rows):
            if row is None:
                continue
            unread = row.unread
            if len(unread) == 1:
                guesses = [] if unread == [self._model.template.ret] else row.guess(ahead)
                chunks.append(Chunk(slot, row.length, unread + guesses, 1 + len(guesses)))
            elif left:
                chunks.append(Chunk(slot, row.length, unread[:left]))
                left -= len(chunks[-1].ids)
        return chunks

    def _retrieve(self, rows: list[Row], states_QD: Tensor) -> None:
        """Searches for all rows that ask, those with the same wishes together."""
        queries_QD = self._model.queries(states_QD, [row.context for row in rows]).float().cpu().numpy()
        left = list(range(len(rows)))
        while left:
            like = rows[left[0]].options
            group = [i for i in left if _searches_alike(rows[i].options, like)]
            left = [i for i in left if i not in group]
            found = self._search(queries_QD[group], [rows[i].words for i in group] if like.hybrid else [], like)
            for i, hits in zip(group, found, strict=True):
                self._insert(rows[i], hits)

    def _search(self, queries_QD: Any, words: list[str], like: Options) -> list[list[Hit] | Exception]:
        """The hits of each query, or the error that it met, alone."""
        try:
            weight = like.hybrid or 0.0
            return list(self._index.search(queries_QD, like.depth, where=like.where, words=words, weight=weight))
        except Exception as e:
            if len(queries_QD) == 1:
                return [e]
        return [
            hits
            for row in range(len(queries_QD))
            for hits in self._search(queries_QD[row : row + 1], words[row : row + 1], like)
        ]

    def _insert(self, row: Row, hits: list[Hit] | Exception) -> None:
        if isinstance(hits, Exception):
            row.fail(_told("the search of the index failed", hits))
            return
        hit = row.choose(hits)
        if hit is None:
            row.withdraw()
            return
        try:
            passage: Passage = self._index.get([hit.id])[0]
        except Exception as e:
            row.fail(_told("a passage that was found could not be read", e))
            return
        row.insert(hit, passage)

    def _write(self, chunks: list[Chunk], states_WD: Tensor) -> None:
        """Chooses each row's next token, and further ones as long as they are what the row has guessed and read."""
        logits_WV = self._reader.logits(states_WD)
        starts = itertools.accumulate((chunk.wanted for chunk in chunks), initial=0)
        left = [
            (place, self._row(chunk.slot), chunk.ids[-chunk.wanted :])
            for place, chunk in zip(starts, chunks, strict=False)
        ]
        while left:
            self._choose([row for _, row, _ in left], logits_WV[[place for place, _, _ in left]])
            left = [(place + 1, row, ids[1:]) for place, row, ids in left if not row.ended and row.unread == ids[1:2]]
            for _, row, _ in left:
                row.read(1)

    def _choose(self, rows: list[Row], logits_RV: Tensor) -> None:
        banned = [(i, token) for i, row in enumerate(rows) for token in row.banned]
        logits_RV[[i for i, _ in banned], [token for _, token in banned]] = -torch.inf
        for i, row in enumerate(rows):
            if (allowed := row.allowed) is not None:
                kept = logits_RV[i, allowed]
                logits_RV[i] = -torch.inf
                logits_RV[i, allowed] = kept
        draws = [row.draw() if row.options.temperature > 0 else 0.0 for row in rows]
        for row, token in zip(rows, choose(logits_RV, [row.options for row in rows], draws), strict=True):
            row.write(token)

    @contextmanager
    def _timing(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        setattr(self.seconds, what, getattr(self.seconds, what) + time.perf_counter() - started)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return sum(1 for _ in pairs)


def _searches_alike(a: Options, b: Options) -> bool:
    return (a.where, a.depth, a.hybrid) == (b.where, b.depth, b.hybrid)


def _told(what: str, error: Exception) -> str:
    return f"{what} ({type(error).__name__}): {error}"
