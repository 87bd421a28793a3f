"""From questions to training examples: a table gives each task its instruction, claim and golds."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from cosup.config import UserError
from cosup.data.records import Evidence, Example, Passage, Question


@dataclass(frozen=True, slots=True)
class TaskRule:
    """How the questions of a task become examples.

    Args:
        instruction: what Gen is told before the question.
        claim: what it is to write: the first short answer or the first long one.
        golds: whether several gold passages are alternatives, any of which will do, or hops, all needed in order.
    """

    instruction: str
    claim: Literal["answer", "long_answer"] = "answer"
    golds: Literal["alternatives", "hops"] = "alternatives"


_ANSWER = "Answer the question."
_VERIFY = "Is the statement true? Say SUPPORTS or REFUTES."
_TRUE_OR_FALSE = "Is the statement true or false?"
_EXPLAIN = "Answer the question in detail."

TASKS: dict[str, TaskRule] = {
    "squad": TaskRule(_ANSWER),
    "newwiki": TaskRule(_ANSWER),
    "nq": TaskRule(_ANSWER),
    "triviaqa": TaskRule(_ANSWER),
    "selqa": TaskRule(_ANSWER),
    "zsre": TaskRule(_ANSWER),
    "trex": TaskRule(_ANSWER),
    "hotpotqa": TaskRule(_ANSWER, golds="hops"),
    "musique": TaskRule(_ANSWER, golds="hops"),
    "fever": TaskRule(_VERIFY),
    "fm2": TaskRule(_VERIFY),
    "asqa": TaskRule(_EXPLAIN, claim="long_answer"),
    "eli5": TaskRule(_EXPLAIN, claim="long_answer"),
    "wow": TaskRule("Reply to the last turn of the conversation."),
    "worldfacts-slot": TaskRule(_ANSWER, claim="long_answer"),
    "worldfacts-qa": TaskRule(_ANSWER, claim="long_answer"),
    "worldfacts-claim": TaskRule(_TRUE_OR_FALSE, claim="long_answer"),
    "worldfacts-hop": TaskRule(_ANSWER, claim="long_answer", golds="hops"),
}
DEFAULT_RULE = TaskRule(_ANSWER)


def rule_of(task: str) -> TaskRule:
    """The rule of a task; one that is not in the table is plain question answering."""
    return TASKS.get(task, DEFAULT_RULE)


def convert(
    questions: Iterable[Question],
    *,
    passages: Mapping[str, Passage],
    left_out: Counter[str] | None = None,
) -> Iterator[Example]:
    """Makes an example of each question that has a gold passage and an answer.

    Args:
        questions: in our own format.
        passages: those that may be cited, by id; the title of the next one is the claim of a hop whose own answer is
            not given.
        left_out: receives, by reason, how many questions gave no example.

    Raises:
        UserError: a question cites a passage that is not in `passages`.
    """
    for question in questions:
        _check_citations(question, passages)
        claims = _claims(question, passages)
        if question.gold and claims:
            yield Example(question.id, question.task, question.question, _response(question, claims))
        elif left_out is not None:
            left_out["no answer" if question.gold else "no gold passage"] += 1


def _response(question: Question, claims: list[str]) -> tuple[Evidence, ...]:
    negatives = tuple(question.negatives)
    if len(claims) == 1:
        return (Evidence(question.gold[0], claims[0], also=tuple(question.gold[1:]), negatives=negatives),)
    return tuple(Evidence(gold, claim, negatives=negatives) for gold, claim in zip(question.gold, claims, strict=True))


def _claims(question: Question, passages: Mapping[str, Passage]) -> list[str]:
    """One claim a retrieval; none if the question can't be answered."""
    rule = rule_of(question.task)
    final = question.long_answers if rule.claim == "long_answer" else question.answers
    if not final:
        return []
    hops = question.gold if rule.golds == "hops" else question.gold[:1]
    return [*_bridges(question, passages), final[0]] if len(hops) > 1 else [final[0]]


def _bridges(question: Question, passages: Mapping[str, Passage]) -> list[str]:
    """What is found at each hop but the last: the hop's own answer, else the title of the passage that it leads to."""
    if len(question.qa_pairs) == len(question.gold) and all(pair.short_answers for pair in question.qa_pairs):
        return [pair.short_answers[0] for pair in question.qa_pairs[:-1]]
    return [passages[following].title or question.question for following in question.gold[1:]]


def _check_citations(question: Question, passages: Mapping[str, Passage]) -> None:
    for passage in (*question.gold, *question.negatives):
        if passage not in passages:
            raise UserError(
                f"question {question.id!r} cites passage {passage!r}, which is in none of the passages files; "
                "name the file that holds it, or remove the citation"
            )
