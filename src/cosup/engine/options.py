"""How a request is to be answered."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

from cosup.config import UserError
from cosup.model import AnswerSettings

Mode = Literal["cosup", "static", "none"]


@dataclass(frozen=True, slots=True)
class Options:
    """How to generate; all but `rows` can differ from request to request.

    Of `quote`, `statements` and `hybrid`, None is the model's own choice: see `cosup.model.AnswerSettings`.

    Args:
        max_new_tokens: most tokens that Gen may choose in a response; those taken back count too.
        max_retrievals: most retrievals in a response; `[Ret]` can't be chosen after them.
        min_score: a passage that scores less is not inserted: the `[Ret]` is taken back and can't be chosen again in
            this response, which says that nothing was found.
        retrieve_first: whether the response begins with a retrieval, whatever Gen would choose.
        forget_passages: whether a passage leaves Gen's context when its claim is closed, so that only
            `[Cs] claim [Ce]` stays: the paper's truncation of the context.
        quote: whether a claim is a piece of its passage, word for word. Not for answers that judge, as true or false.
        statements: whether a claim becomes what its passage states: the sentence that holds it, or is nearest to it,
            or whole clauses of that up to 20 words. A verdict, as true or false, stays. Claims are then reported when
            they are closed.
        hybrid: what words count in a search: of the passages that it considers, the one with the best BM25 score for
            the question and the answer so far gains this much, others in proportion. 0: the state alone searches. The
            scores that are reported, and those that `min_score` is held against, are the state's in any case.
        mode: `cosup` retrieves where Gen asks; `static` once, with the prompt, before it writes; `none` never.
        candidates: how many passages a retrieval reports.
        where: values that `meta` of a passage must have to be found.
        temperature: 0 always takes the likeliest token; higher ones sample.
        top_p: sample only from the likeliest tokens that together reach this probability.
        top_k: sample only from this many of the likeliest tokens; 0: from all.
        seed: of the sampling; the same request gives the same response, whatever else is answered beside it.
        stop: strings before which the response ends; they are not part of it.
        rows: of the engine: requests that are worked on at once. Without effect in the options of one request.
        guesses: of the engine: most tokens that a row reads ahead where few rows are in use, guessed from what the
            context repeats; they change the speed, not the response. 0 turns it off.

    Raises:
        UserError: a value out of range, or two that contradict each other.
    """

    max_new_tokens: int = 128
    max_retrievals: int = 4
    min_score: float | None = None
    retrieve_first: bool = False
    forget_passages: bool = False
    quote: bool | None = None
    statements: bool | None = None
    hybrid: float | None = None
    mode: Mode = "cosup"
    candidates: int = 5
    where: Mapping[str, Any] | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    rows: int = 16
    guesses: int = 7

    def __post_init__(self) -> None:
        for name, least in (
            ("max_new_tokens", 1),
            ("max_retrievals", 0),
            ("candidates", 1),
            ("top_k", 0),
            ("rows", 1),
            ("guesses", 0),
        ):
            _refuse(getattr(self, name) < least, name, getattr(self, name), f"at least {least}")
        _refuse(not 0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or more")
        _refuse(not 0 <= (self.hybrid or 0.0) < math.inf, "hybrid", self.hybrid, "0 or more")
        _refuse(not 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _refuse(self.mode not in get_args(Mode), "mode", self.mode, f"one of {', '.join(get_args(Mode))}")
        _refuse(isinstance(self.stop, str) or "" in self.stop, "stop", self.stop, "a sequence of strings, none empty")
        if self.retrieve_first and not self.most_retrievals:
            raise UserError(
                f"retrieve_first asks for a retrieval, and mode {self.mode!r} with max_retrievals "
                f"{self.max_retrievals} allows none; change one of them"
            )

    def settled(self, answers: AnswerSettings) -> Self:
        """These, with a model's own choices in the place of None."""
        chosen = {name: value for name, value in answers.model_dump().items() if getattr(self, name) is None}
        return replace(self, **chosen)

    @property
    def retrieves_first(self) -> bool:
        """Whether the response begins with a retrieval."""
        return self.retrieve_first or self.mode == "static"

    @property
    def most_retrievals(self) -> int:
        """How many retrievals the mode allows."""
        return {"cosup": self.max_retrievals, "static": 1, "none": 0}[self.mode]

    @property
    def depth(self) -> int:
        """How many passages are searched for: what is reported, and always one that was not inserted before."""
        return max(self.candidates, self.most_retrievals)


def _refuse(bad: bool, name: str, value: object, allowed: str) -> None:
    if bad:
        raise UserError(f"{name} must be {allowed}, not {value!r}")
