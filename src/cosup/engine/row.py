"""One request in progress: its context, and the rules of what may come next.

The rules: Gen can't write `[Cs]`, and `[Ce]` only inside a claim. `[Ret]` is followed by the passage and `[Cs]`. A
`[Ret]` or an end of sequence that Gen chooses inside a claim comes after a `[Ce]` that is put before it. A `[Ret]`
whose search finds nothing is taken back. Where claims become statements, each is reported once Gen has closed it, and
Gen reads the statement in the place of its own words.
"""

import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import replace

from cosup.data import Passage
from cosup.engine.events import ClaimClosed, ClaimOpened, Event, Finished, Inserted, Retrieved, Token
from cosup.engine.options import Options
from cosup.engine.quotes import Quotes, text_read
from cosup.engine.statements import statement
from cosup.index import Hit
from cosup.template import Claim, Parser, Reason, Response, Template

ROOM_FOR_CLAIM = 2
"""Tokens that must still fit the context: one to write, and the end."""


class Row:
    """One request in progress.

    Args:
        request: its number.
        prompt: ids, at least one.
        options: of this request.
        template: knows the tokens.
        limit: how many tokens Gen can read.

    Attributes:
        context: all ids from the prompt on; the first `length` are in the cache, the others are still to be read.
        events: what happened since they were last taken.
        ended: whether the last event was written.
    """

    def __init__(self, request: int, prompt: Sequence[int], options: Options, *, template: Template, limit: int):
        self.request, self.options = request, options
        self.context, self.length = list(prompt), 0
        self.events: list[Event] = []
        self.ended = False
        self._template, self._limit = template, limit
        self._parser = Parser(template)
        self._prompt = len(prompt)
        self._random = random.Random(options.seed)
        self._hits: list[tuple[Hit, ...]] = []
        self._cited: list[Hit] = []
        self._shortened: list[str] = []
        self._ret = self._claim = 0  # places in `context` of the last [Ret] and of the token after its [Cs]
        self._nothing_found = self._forced = False
        self._title = self._text = ""  # of the passage cited now, as far as Gen has read it, where claims depend on it
        self._quotes: Quotes | None = None  # of that passage, where claims quote
        self._read = self.sampled = 0
        self._shown, self._cut = "", -1
        self._started = time.perf_counter()
        if options.retrieves_first:
            self._ask()

    @property
    def unread(self) -> list[int]:
        """What Gen has still to read."""
        return self.context[self.length :]

    @property
    def asks(self) -> bool:
        """Whether all is read, and the last of it is a `[Ret]`."""
        return self.length == len(self.context) and self.context[-1] == self._template.ret

    @property
    def words(self) -> str:
        """What a search by words looks for: the question, and what is written of the answer."""
        return f"{self._template.asked(self.context[: self._prompt])} {self._parser.text}"

    @property
    def banned(self) -> list[int]:
        """Tokens that Gen can't choose now."""
        t = self._template
        banned = [t.cs] if self._parser.state == "claim" else [t.cs, t.ce]
        if self._nothing_found or len(self._hits) >= self.options.most_retrievals:
            banned.append(t.ret)
        return banned

    @property
    def allowed(self) -> list[int] | None:
        """The only tokens that Gen can choose now; None where it is all but the banned ones."""
        if self._quotes is None or self._parser.state != "claim":
            return None
        following, ends = self._quotes.next(self.context[self._claim :])
        return [*following, self._template.ce] if ends else following

    def guess(self, most: int) -> list[int]:
        """What may come next, none of it sure: what followed when the last two tokens stood here before.

        Claims repeat their passages. Guesses are read together with the token before them, and kept as far as Gen
        chooses the same.

        Args:
            most: how many, at most.
        """
        left = self.options.max_new_tokens - self.sampled - 1
        most = min(most, left, self._limit - len(self.context))
        pair, t = self.context[-2:], self._template
        for place in range(len(self.context) - 2, 1, -1) if most > 0 else ():
            if self.context[place - 2 : place] == pair:
                ahead = self.context[place : place + most]
                return list(itertools.takewhile(lambda token: token not in (t.ret, t.cs, t.ce, t.eos), ahead))
        return []

    def draw(self) -> float:
        """The next random number of this request, from [0, 1)."""
        return self._random.random()

    def read(self, count: int) -> None:
        """So many more tokens are in the cache."""
        self.length += count
        self._read += count

    def write(self, token: int) -> None:
        """Takes a token that Gen chose, and what the rules put before it."""
        t = self._template
        self.sampled += 1
        if self._parser.state == "claim" and token in (t.ret, t.eos):
            self._forced = True
            self._close_claim()
        spent = self.sampled >= self.options.max_new_tokens
        full = len(self.context) + 1 + ROOM_FOR_CLAIM >= self._limit
        if self._withholds and token not in (t.ret, t.ce, t.eos):
            self.context.append(token)
            if spent or full:
                self._state_claim(final=True)
        elif token == t.ret and not (spent or full):
            self._ask()
        elif token == t.ce:
            self._close_claim(final=spent or full)
        else:
            self._append(token, final=token == t.eos or spent or full)
        if token == t.eos or self._cut >= 0:
            self._finish("stop")
        elif spent or full:
            self._finish("length")

    def choose(self, hits: Sequence[Hit]) -> Hit | None:
        """The best passage that this response has not read yet, if it is good enough."""
        self._ret = len(self.context) - 1
        self._hits.append(tuple(hits[: self.options.candidates]))
        read = {hit.id for hit in self._cited}
        best = next((hit for hit in hits if hit.id not in read), None)
        if best is None or (self.options.min_score is not None and best.score < self.options.min_score):
            return None
        return best

    def insert(self, hit: Hit, passage: Passage) -> None:
        """Puts a passage after `[Ret]`, shortened where the context is nearly full, and opens the claim."""
        room = min(self._template.settings.max_passage_tokens, self._limit - len(self.context) - ROOM_FOR_CLAIM)
        fits = room >= 2
        self._report(self._template.ret, final=not fits)
        self.events.append(Retrieved(self._hits[-1]))
        if not fits:
            self._finish("length")
            return
        self._cited.append(hit)
        if not self._template.fits(passage, max_tokens=room):
            self._shortened.append(hit.id)
        self.events.append(Inserted(hit.id, hit.score))
        inserted = self._template.inserted(passage, max_tokens=room)
        for token in inserted:
            self._append(token, inserted=True)
        self._claim = len(self.context)
        if self.options.quote or self.options.statements:
            self._title, self._text = passage.title, text_read(passage, inserted[:-1], self._template)
        self._quotes = Quotes(passage.title, self._text, self._template) if self.options.quote else None
        self.events.append(ClaimOpened(hit.id))

    def withdraw(self) -> None:
        """Takes `[Ret]` back; the token before it is read again, to choose another in its place."""
        self.events.append(Retrieved(self._hits[-1], found=False))
        self._nothing_found = True
        del self.context[self._ret :]
        self.length = self._ret - 1

    def fail(self, error: str) -> None:
        """Ends the response because of an error."""
        self._finish("error", error)

    def _ask(self) -> None:
        """Writes a `[Ret]`, which is reported when its search found something."""
        self.context.append(self._template.ret)

    @property
    def _withholds(self) -> bool:
        """Whether what Gen writes now is reported only when its claim is closed."""
        return bool(self.options.statements) and self._parser.state == "claim"

    def _state_claim(self, *, final: bool = False) -> None:
        """Puts what the passage states in the place of what Gen has chosen of it, if it fits the context."""
        t, chosen = self._template, self.context[self._claim :]
        claim = t.decode(chosen)
        stated = statement(t.asked(self.context[: self._prompt]), claim, self._text, title=self._title)
        written = chosen if stated == claim else t.encode(stated)
        if self._claim + len(written) + 1 + ROOM_FOR_CLAIM >= self._limit:
            written = chosen
        if written != chosen:
            self.length = self._claim
        del self.context[self._claim :]
        for place, token in enumerate(written, start=1):
            self._append(token, final=final and place == len(written))

    def _close_claim(self, *, final: bool = False) -> None:
        if self._withholds:
            self._state_claim()
        self._append(self._template.ce, final=final)
        if self.options.forget_passages:
            self.context[self._ret :] = [self._template.cs, *self.context[self._claim :]]
            self.length = self._ret

    def _append(self, token: int, *, inserted: bool = False, final: bool = False) -> None:
        self.context.append(token)
        self._report(token, inserted=inserted, final=final)

    def _report(self, token: int, *, inserted: bool = False, final: bool = False) -> None:
        claims = len(self._parser.claims)
        self._parser.read(token, inserted=inserted)
        self.events.append(Token("" if inserted else self._new_text(final=final), token, inserted))
        self._report_claims(claims)

    def _report_claims(self, known: int) -> None:
        for claim in self._parser.claims[known:]:
            self.events.append(ClaimClosed(claim.start, claim.end))

    def _new_text(self, *, final: bool) -> str:
        text = self._parser.text
        places = [place for stop in self.options.stop if (place := text.find(stop)) >= 0]
        if places:
            self._cut = min(places)
            text = text[: self._cut]
        elif not final:
            if text.endswith("\N{REPLACEMENT CHARACTER}"):  # the character's other bytes are still to come
                return ""
            text = text[: len(text) - _held(text, self.options.stop)]
        text = text.rstrip("\N{REPLACEMENT CHARACTER}") if final else text
        new, self._shown = text[len(self._shown) :], text
        return new

    def _finish(self, reason: Reason, error: str = "") -> None:
        claims = len(self._parser.claims)
        parsed = self._parser.finish()
        self._report_claims(claims)
        cited = zip(parsed.claims, self._cited, strict=True)
        response = replace(
            parsed,
            claims=tuple(Claim(claim.text, claim.start, claim.end, hit.id, hit.score) for claim, hit in cited),
            well_formed=parsed.well_formed and not self._forced,
            reason=reason,
            error=error,
            nothing_found=self._nothing_found,
            retrieved=tuple(tuple(hit.id for hit in hits) for hits in self._hits),
            scores=tuple(tuple(hit.score for hit in hits) for hits in self._hits),
            shortened=tuple(self._shortened),
            tokens_read=self._read,
            tokens_sampled=self.sampled,
            seconds=time.perf_counter() - self._started,
        )
        self.ended = True
        self.events.append(Finished(reason, response if self._cut < 0 else _cut(response, self._cut)))


def _held(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    longest = max((len(stop) for stop in stops), default=0)
    lengths = range(min(longest - 1, len(text)), 0, -1)
    return next((length for length in lengths if any(stop.startswith(text[-length:]) for stop in stops)), 0)


def _cut(response: Response, end: int) -> Response:
    """The response up to a character."""
    claims = [
        replace(
            claim, text=claim.text[: max(end - claim.start, 0)], start=min(claim.start, end), end=min(claim.end, end)
        )
        for claim in response.claims
    ]
    return replace(response, text=response.text[:end], claims=tuple(claims))
