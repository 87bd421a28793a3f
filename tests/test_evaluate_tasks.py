"""The paper's data sets: whoever answers the gold is right by every measure of its task, and nobody else is.

The questions here are made up; those of the real sets are read where the shared data lies beside the checkout.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cosup.data import Passage, QAPair, Question, read_passages
from cosup.engine import Options
from cosup.evaluate import (
    HEADLINES,
    Evaluation,
    Figure,
    PassageTexts,
    Prediction,
    RunSettings,
    evaluate_tasks,
    judge,
    read_tasks,
    summarize,
)
from cosup.evaluate.model import verdicts
from cosup.index import build_index
from cosup.model import CoSupModel

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not (SHARED / "dev").is_dir(), reason=f"{SHARED} is absent")

CLAIMED = ["answer_accuracy", "exact_match", "token_f1"]
WHOLE = ["answer_in_text", "exact_match_text", "token_f1_text", "rouge_l"]
GROUNDED = ["grounded_claims", "answer_in_text_retrieved"]
RIGHT = {
    "squad": [*CLAIMED, *WHOLE, *GROUNDED],
    "nq": [*CLAIMED, *WHOLE, *GROUNDED],
    "triviaqa": [*CLAIMED, *WHOLE, *GROUNDED],
    "hotpotqa": [*CLAIMED, *WHOLE, *GROUNDED],
    "zsre": [*CLAIMED, *WHOLE, *GROUNDED],
    "trex": [*CLAIMED, *WHOLE, *GROUNDED],
    "fever": [*CLAIMED, *WHOLE, "label_accuracy"],
    "wow": [*CLAIMED, *WHOLE, *GROUNDED],
    "eli5": ["rouge_l"],
    "asqa": ["answer_accuracy", "answer_in_text", "string_em", "string_em_hit", *GROUNDED],
}
"""What is 1 for whoever answers the gold. Of ASQA and ELI5 the rest compares with one of several long answers."""


def made_up(task: str) -> list[Question]:
    """Three questions of a task, with and without gold where the real sets have both."""
    base = Question("q", task, "Which city?", answers=["Oslo", "Christiania"])
    match task:
        case "fever":
            asked = [replace(base, answers=[label], label=label) for label in ("SUPPORTS", "REFUTES", "SUPPORTS")]
        case "eli5":
            asked = [replace(base, answers=[], long_answers=[f"It rains {n} times."]) for n in range(3)]
        case "asqa":
            pairs = [QAPair("then?", ["Christiania"]), QAPair("now?", ["Oslo", "Oslo city"])]
            asked = [replace(base, qa_pairs=pairs, long_answers=["Christiania became Oslo."])] * 3
        case _:
            asked = [base] * 3
    gold = [] if task in ("zsre", "trex", "eli5") else ["g0", "g1"]
    return [replace(q, id=f"q{n}", gold=[] if task == "triviaqa" and n == 2 else gold) for n, q in enumerate(asked)]


def gold_answer(question: Question) -> str:
    """What the references of a question say."""
    if question.qa_pairs:
        return " ".join(pair.short_answers[0] for pair in question.qa_pairs if pair.short_answers)
    return [*question.answers, *question.long_answers, ""][0]


def answered(questions: Sequence[Question], *, right: bool) -> Evaluation:
    """By an engine that finds the gold first and says what the references say; or by one that does neither."""
    items, labels = [], verdicts(questions)
    for question in questions:
        gold = question.gold or ["any"]
        holds = {id: Passage(id, " ".join([*question.answers, "."]), f"title of {id}") for id in gold}
        holds["x"] = Passage("x", "nothing", "of use")
        text, found = (gold_answer(question), gold) if right else ("zebra", ["x"])
        prediction = Prediction(
            question.id, text, [text], [[0, len(text)]], found[:1], [found], found, found, "stop", "", True
        )
        texts = PassageTexts(lambda ids, holds=holds: [holds[id] for id in ids])
        items.append(judge(question, prediction, texts=texts, labels=labels))
    return Evaluation(summarize(items), items)


@pytest.mark.parametrize("task", RIGHT)
def test_the_gold_answer_is_right_and_another_one_wrong_by_every_measure_of_a_task(task: str) -> None:
    questions = made_up(task)
    oracle, fool = answered(questions, right=True).figures, answered(questions, right=False).figures
    for name in RIGHT[task]:
        assert oracle[name] == Figure(1.0, 3), name
        assert fool[name] == Figure(0.0, 3), name
    if task in HEADLINES:
        assert set(HEADLINES[task].correctness) - {"claim_recall"} <= set(RIGHT[task])
    if "answer_in_text_retrieved" in oracle:
        assert oracle["reduction_rate"] == Figure(0.0, 3)


@pytest.mark.parametrize("task", RIGHT)
def test_the_gold_passages_found_first_are_perfect_retrieval_in_every_task(task: str) -> None:
    questions = made_up(task)
    oracle, fool = answered(questions, right=True).figures, answered(questions, right=False).figures
    golden = sum(bool(question.gold) for question in questions)
    ways = [f"{way}_{name}" for way in ("forced", "free", "bm25") for name in ("success@1", "r_precision", "mrr")]
    for name in ways if golden else ():
        assert (oracle[name], fool[name]) == (Figure(1.0, golden), Figure(0.0, golden))
    unknown = sum(not question.gold and bool(question.answers) for question in questions)
    for way in ("forced", "free", "bm25") if unknown else ():
        name = f"{way}_answer_success@1"
        assert (oracle[name], fool[name]) == (Figure(1.0, unknown), Figure(0.0, unknown))


def test_a_hop_that_is_missing_halves_the_r_precision_of_hotpotqa_but_not_of_alternatives() -> None:
    hops, either = (Question("q", task, "?", answers=["a"], gold=["g0", "g1"]) for task in ("hotpotqa", "nq"))
    texts = PassageTexts(lambda ids: [Passage(id, "a", id) for id in ids])
    found = Prediction("q", forced=["g0", "x", "g1"])
    assert judge(hops, found, texts=texts)["scores"]["forced_r_precision"] == 0.5
    assert judge(either, found, texts=texts)["scores"]["forced_r_precision"] == 1.0


@needs_shared
@pytest.mark.parametrize("task", RIGHT)
def test_in_the_whole_of_a_real_set_the_gold_answers_are_right(task: str) -> None:
    (read,) = read_tasks([task], data=SHARED)
    assert {question.task for question in read.questions} == {task}
    figures = answered(read.questions, right=True).figures
    if task == "wow":  # without people's replies, only retrieval is judged
        assert figures["free_success@1"] == Figure(1.0, len(read.questions))
        assert figures["answer_accuracy"] == Figure(None, 0)
        return
    for name in RIGHT[task]:
        # two answers of TriviaQA hold no letter that ROUGE's words are made of
        least = 0.99 if name == "rouge_l" else 1.0
        assert figures[name].count == len(read.questions)
        assert figures[name].value == pytest.approx(1.0, abs=1.0 - least), name


@needs_shared
def test_all_ten_real_sets_are_evaluated_by_name(tiny: CoSupModel, tmp_path: Path) -> None:
    tasks = read_tasks([",".join(RIGHT)], data=SHARED, limit=3)
    cited = {id for task in tasks for question in task.questions for id in question.gold}
    corpus = [p for n, p in enumerate(read_passages(SHARED / "corpus.jsonl.gz")) if n < 40 or p.id in cited]
    short = [replace(passage, text=passage.text[:200]) for passage in corpus]  # the tiny model reads no more
    index = build_index(short, tiny, tmp_path / "index")
    settings = RunSettings(options=Options(max_new_tokens=4))
    found = evaluate_tasks(tiny, index, tasks, tmp_path / "run", settings=settings)
    assert list(found) == list(RIGHT)
    for task in tasks:
        figures = found[task.name].figures
        assert len(found[task.name].items) == 3
        assert figures["failed"] == Figure(0.0, 3)
        for name in RIGHT[task.name] if task.name != "wow" else ():
            assert figures[name].count == 3
