"""Citations as ALCE judges them, and what an answer owes to the passages that it was given."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Pair = tuple[str, str]
"""A premise and a hypothesis."""


@dataclass(frozen=True, slots=True)
class Statement:
    """A part of an answer that is judged by itself.

    Args:
        text: what is said, without citation marks.
        passages: texts of the passages that it cites, in order; none where it cites nothing.
    """

    text: str
    passages: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CitationScores:
    """Both in [0, 1]; 0.0 where there is no statement, or no citation."""

    recall: float
    precision: float


def citation_pairs(statements: Sequence[Statement]) -> Iterator[Pair]:
    """Every pair that `citation_scores` may ask of, so that they can be judged in batches beforehand."""
    for statement in statements:
        if statement.passages:
            yield _joined(statement.passages), statement.text
        if len(statement.passages) > 1:
            for place, passage in enumerate(statement.passages):
                yield passage, statement.text
                yield _joined(_without(statement.passages, place)), statement.text


def citation_scores(statements: Sequence[Statement], entails: Callable[[Pair], bool]) -> CitationScores:
    """Citation recall and precision of one answer.

    Recall is the share of statements that their passages, read together, entail; a statement without a citation is
    not entailed. A citation is precise where its statement is entailed and the passage either entails it alone or is
    missed by the others; precision is the share of such citations.

    Args:
        statements: of the answer, in order.
        entails: whether the premise entails the hypothesis; is asked of pairs of `citation_pairs` only.

    Source:
        ALCE (Gao et al., EMNLP 2023), section 3. An answer without statements scores 0 here and is left out there.
    """
    cited = sum(len(statement.passages) for statement in statements)
    entailed = [_is_entailed(statement, entails) for statement in statements]
    precise = sum(_precise(statement, entails) for statement, is_so in zip(statements, entailed, strict=True) if is_so)
    return CitationScores(
        recall=sum(entailed) / len(statements) if statements else 0.0, precision=precise / cited if cited else 0.0
    )


def claim_recall(answer: str, claims: Sequence[str], entails: Callable[[Pair], bool]) -> float:
    """The share of the claims of a complete answer that an answer entails; 0.0 where there are none.

    Source:
        Claim recall of ALCE for ELI5.
    """
    return sum(entails((answer, claim)) for claim in claims) / len(claims) if claims else 0.0


def _is_entailed(statement: Statement, entails: Callable[[Pair], bool]) -> bool:
    return bool(statement.passages) and entails((_joined(statement.passages), statement.text))


def _precise(statement: Statement, entails: Callable[[Pair], bool]) -> int:
    """How many citations of an entailed statement are needed."""
    if len(statement.passages) == 1:
        return 1
    return sum(
        entails((passage, statement.text))
        or not entails((_joined(_without(statement.passages, place)), statement.text))
        for place, passage in enumerate(statement.passages)
    )


def _joined(passages: Sequence[str]) -> str:
    return "\n".join(passages)


def _without(passages: Sequence[str], place: int) -> tuple[str, ...]:
    return (*passages[:place], *passages[place + 1 :])
