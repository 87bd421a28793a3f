"""One question's judgement: what was retrieved, answered and cited, against what is known."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cosup import metrics
from cosup.data import Passage, Question
from cosup.data.convert import rule_of
from cosup.data.documents import sentences
from cosup.evaluate.figures import Item
from cosup.index.parts import whole_of
from cosup.template import Response

DEPTH = 20
"""How many passages of a ranking are looked at."""

Entails = Callable[[metrics.Pair], bool]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model made of one question.

    Args:
        id: of the question.
        text: the whole answer, passages not included.
        claims: texts of the claims.
        spans: where each claim stands in the text, start and end.
        cited: id of the passage that each claim cites.
        retrieved: ids of each of the model's own retrievals, best first.
        forced: ids of the forced retrieval, best first; None where the mode never retrieves.
        bm25: ids that BM25 finds, best first.
        reason: why it ended; `error` where it failed.
        error: what went wrong then.
        well_formed: see `Response`.
    """

    id: str
    text: str = ""
    claims: Sequence[str] = ()
    spans: Sequence[Sequence[int]] = ()
    cited: Sequence[str] = ()
    retrieved: Sequence[Sequence[str]] = ()
    forced: Sequence[str] | None = ()
    bm25: Sequence[str] = ()
    reason: str = "unknown"
    error: str = ""
    well_formed: bool = False

    @classmethod
    def of(cls, id: str, response: Response, *, forced: Sequence[str] | None, bm25: Sequence[str]) -> "Prediction":
        """A prediction from what the engine gave."""
        return cls(
            id,
            response.text,
            [claim.text for claim in response.claims],
            [[claim.start, claim.end] for claim in response.claims],
            [claim.passage for claim in response.claims],
            [list(ids) for ids in response.retrieved],
            forced if forced is None else list(forced),
            list(bm25),
            response.reason,
            response.error,
            response.well_formed,
        )


class PassageTexts:
    """The passages that a judgement looks into, each fetched and normalised once.

    Args:
        get: gives passages by id, as an index does; raises KeyError for an id that it does not know.
    """

    def __init__(self, get: Callable[[Sequence[str]], list[Passage]]):
        self._get = get
        self._passages: dict[str, Passage] = {}
        self._normalized: dict[str, str] = {}

    def load(self, ids: Iterable[str]) -> None:
        """Fetches those that are not there yet, together."""
        missing = [id for id in dict.fromkeys(ids) if id not in self._passages]
        self._passages |= zip(missing, self._get(missing) if missing else (), strict=True)

    def passage(self, id: str) -> Passage:
        """The passage."""
        self.load([id])
        return self._passages[id]

    def has(self, id: str) -> bool:
        """Whether there is a passage with this id, or one that stands for it."""
        try:
            return bool(self.passage(id))
        except KeyError:
            return False

    def normalized(self, id: str) -> str:
        """Title and text as `normalize_answer` makes them."""
        if id not in self._normalized:
            passage = self.passage(id)
            self._normalized[id] = metrics.normalize_answer(f"{passage.title} {passage.text}")
        return self._normalized[id]

    def whole(self, id: str) -> str:
        """The id under which the index holds the passage: of a part that indexing split off, the whole passage's, and
        of a duplicate, that of the passage that stands for it; the id itself where the index has none."""
        return whole_of(self.passage(id)) if self.has(id) else id

    def page(self, id: str) -> str:
        """The page that a passage is of: `meta.page` where it is a text, else the title, else itself."""
        passage = self.passage(id)
        page = passage.meta.get("page")  # in a PDF, a number
        return page if page and isinstance(page, str) else passage.title or id


def judge(question: Question, prediction: Prediction, *, texts: PassageTexts, labels: Collection[str] = ()) -> Item:
    """One question's outcome; judgements that it has no reference for are absent.

    Args:
        question: with what is known.
        prediction: of it.
        texts: of the passages that the prediction names.
        labels: every verdict that the task knows.
    """
    ranked = [ids for ids in _rankings(prediction).values() if ids is not None]
    texts.load([*prediction.cited, *(id for ids in ranked for id in ids)])
    scores: dict[str, float] = {
        "well_formed": float(prediction.well_formed),
        "cites": float(bool(prediction.cited)),
        "failed": float(prediction.reason == "error"),
    }
    scores |= _retrieval(question, prediction, texts)
    scores |= _correctness(question, prediction, labels)
    scores |= _grounding(question, prediction, texts)
    return {
        "id": question.id,
        "task": question.task,
        "question": question.question,
        "answers": question.answers or question.long_answers,
        "gold": question.gold,
        "text": prediction.text,
        "claims": list(prediction.claims),
        "spans": [list(span) for span in prediction.spans],
        "cited": list(prediction.cited),
        "forced": list(prediction.forced or ()),
        "retrieved": [list(ids) for ids in prediction.retrieved],
        "reason": prediction.reason,
        "error": prediction.error,
        "scores": scores,
    }


def statements(item: Mapping[str, Any], texts: PassageTexts) -> list[metrics.Statement]:
    """The claims of an answer with their passages, and the sentences around them, which cite nothing, in order."""
    found, end = [], 0
    for (start, stop), claim, cited in zip(item["spans"], item["claims"], item["cited"], strict=True):
        found += _uncited(item["text"][end:start])
        if claim.strip():
            passage = texts.passage(cited)
            found.append(metrics.Statement(claim, (f"Title: {passage.title}\n{passage.text}",)))
        end = stop
    return [*found, *_uncited(item["text"][end:])]


def pairs_of(question: Question, item: Mapping[str, Any], texts: PassageTexts) -> Iterator[metrics.Pair]:
    """Every pair that `judge_entailment` asks of."""
    yield from metrics.citation_pairs(statements(item, texts))
    if item["text"].strip():
        yield from ((item["text"], claim) for claim in question.claims)


def judge_entailment(
    question: Question, item: Mapping[str, Any], texts: PassageTexts, entails: Entails
) -> dict[str, float]:
    """The scores that an NLI model gives: citation recall and precision, and claim recall where claims are known."""
    citations = metrics.citation_scores(statements(item, texts), entails)
    scores = {"citation_recall": citations.recall, "citation_precision": citations.precision}
    if question.claims:
        answered = bool(item["text"].strip())
        scores["claim_recall"] = metrics.claim_recall(item["text"], question.claims, entails) if answered else 0.0
    return scores


def _retrieval(question: Question, prediction: Prediction, texts: PassageTexts) -> dict[str, float]:
    scores: dict[str, float] = {}
    pages = set(question.pages) or {texts.page(id) for id in question.gold}
    hops = rule_of(question.task).golds == "hops"
    known = [id for id in question.gold if not question.pages or texts.has(id)]  # a corpus may be cut otherwise
    gold = list(dict.fromkeys(map(texts.whole, known)))
    for way, ranked in _rankings(prediction).items():
        if ranked is None:
            continue
        if gold:
            passages = metrics.first_of_each(map(texts.whole, ranked))
            scores |= _ranking(f"{way}_", passages, gold, hops=hops)
        if pages:
            scores |= _ranking(f"{way}_page_", metrics.first_of_each(map(texts.page, ranked)), pages, hops=hops)
        if not question.gold and not pages and question.answers and not question.label:
            scores |= _by_answer(f"{way}_answer_", ranked, question.answers, texts)
    if gold:
        cited = {texts.whole(id) for id in prediction.cited}
        right = cited.intersection(gold)
        scores["cited_precision"] = len(right) / len(cited) if cited else 0.0
        scores["cited_recall"] = len(right) / len(gold)
    return scores


def _ranking(start: str, ranked: Sequence[str], gold: Collection[str], *, hops: bool) -> dict[str, float]:
    sets = [gold] if hops else [[id] for id in gold]
    return {
        **{f"{start}success@{k}": metrics.success_at(ranked, gold, k=k) for k in (1, 5, DEPTH)},
        **{f"{start}recall@{k}": metrics.recall_at(ranked, gold, k=k) for k in (5, DEPTH)},
        **{f"{start}precision@{k}": metrics.precision_at(ranked, gold, k=k) for k in (1, 5)},
        f"{start}r_precision": metrics.best_r_precision(ranked, sets),
        f"{start}mrr": metrics.reciprocal_rank(ranked, gold),
    }


def _by_answer(start: str, ranked: Sequence[str], answers: Sequence[str], texts: PassageTexts) -> dict[str, float]:
    wanted = _normalized(answers)
    right = [id for id in ranked if metrics.found_in(texts.normalized(id), wanted)] or ["none of them"]
    return {
        **{f"{start}success@{k}": metrics.success_at(ranked, right, k=k) for k in (1, 5, DEPTH)},
        **{f"{start}precision@{k}": metrics.precision_at(ranked, right, k=k) for k in (1, 5)},
        f"{start}mrr": metrics.reciprocal_rank(ranked, right),
    }


def _correctness(question: Question, prediction: Prediction, labels: Collection[str]) -> dict[str, float]:
    scores: dict[str, float] = {}
    text, claims = prediction.text, prediction.claims
    if question.answers:
        last = claims[-1] if claims else ""
        scores["answer_accuracy"] = float(metrics.answer_in(" ".join(claims), question.answers))
        scores["exact_match"] = metrics.exact_match(last, question.answers)
        scores["token_f1"] = metrics.token_f1(last, question.answers)
        scores["answer_in_text"] = float(metrics.answer_in(text, question.answers))
        scores["exact_match_text"] = metrics.exact_match(text, question.answers)
        scores["token_f1_text"] = metrics.token_f1(text, question.answers)
    if references := question.long_answers or question.answers:
        scores["rouge_l"] = metrics.rouge_l(text, references)
    if question.label and question.answers:
        right = float(metrics.verdict(text, labels or [question.label]) == question.label)
        scores["label_accuracy"] = scores[f"label_accuracy[{question.label}]"] = right
    readings = [pair.short_answers for pair in question.qa_pairs]
    if any(readings) and rule_of(question.task).golds == "alternatives":
        scores["string_em"] = metrics.string_em(text, readings)
        scores["string_em_hit"] = float(scores["string_em"] == 1.0)
    return scores


def _grounding(question: Question, prediction: Prediction, texts: PassageTexts) -> dict[str, float]:
    """What stands in the passages; a verdict stands in none, so questions with a label are not judged."""
    if not question.answers or question.label:
        return {}
    wanted = _normalized(question.answers)
    said = [answer for answer in wanted if metrics.found_in(metrics.normalize_answer(prediction.text), [answer])]
    read = any(metrics.found_in(texts.normalized(id), said) for id in prediction.cited)
    grounded = [
        any(metrics.found_in(texts.normalized(id), [a]) and metrics.found_in(normalized, [a]) for a in wanted)
        for normalized, id in zip(map(metrics.normalize_answer, prediction.claims), prediction.cited, strict=True)
    ]
    return {
        "grounded_claims": sum(grounded) / len(grounded) if grounded else 0.0,
        "answer_in_text_retrieved": float(bool(said) and read),
    }


def _normalized(answers: Iterable[str]) -> list[str]:
    return [normalized for answer in answers if (normalized := metrics.normalize_answer(answer))]


def _rankings(prediction: Prediction) -> dict[str, Sequence[str] | None]:
    """What is judged as retrieval, by way; None where a way was not tried."""
    free = prediction.retrieved[0] if prediction.retrieved else ()
    return {"forced": prediction.forced, "free": free, "bm25": prediction.bm25}


def _uncited(text: str) -> list[metrics.Statement]:
    # a full stop that stands behind a claim says nothing
    said = (sentence.strip() for sentence in sentences(text))
    return [metrics.Statement(sentence) for sentence in said if any(map(str.isalnum, sentence))]
