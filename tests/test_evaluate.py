import json
from pathlib import Path

import pytest

from cosup.config import UserError
from cosup.data import Passage, Question
from cosup.engine import Options
from cosup.evaluate import LABELS, Evaluation, Figure, evaluate_model, ntp_loss
from cosup.index import FlatIndex, build_index
from cosup.model import CoSupModel


@pytest.fixture
def index(tiny: CoSupModel, passages: list[Passage], tmp_path: Path) -> FlatIndex:
    return build_index(passages, tiny, tmp_path / "index")


def test_every_figure_has_its_count_and_equals_the_mean_of_its_items(
    tiny: CoSupModel, index: FlatIndex, questions: list[Question], tmp_path: Path
) -> None:
    asked = [*questions, Question("q4", "squad", "no gold?", answers=["Oslo"]), Question("q5", "wow", "x", gold=["p2"])]
    evaluation = evaluate_model(tiny, index, asked, options=Options(max_new_tokens=6))
    assert list(evaluation.figures)[: len(LABELS)] == list(LABELS)
    assert evaluation.figures["forced_success@1"].count == 5
    assert evaluation.figures["answer_accuracy"].count == 5
    assert evaluation.figures["cites"].count == 6
    for name, figure in evaluation.figures.items():
        values = [item["scores"][name] for item in evaluation.items if name in item["scores"]]
        if name not in ("ntp", "claim_words", "reduction_rate"):
            assert figure == Figure(pytest.approx(sum(values) / len(values)), len(values))
    evaluation.save(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert saved["bm25_success@1"]["value"] == evaluation.figures["bm25_success@1"].value
    assert saved["bm25_success@1"]["count"] == 5
    assert Evaluation.load(tmp_path / "out") == evaluation
    assert len((tmp_path / "out" / "items.jsonl").read_text().splitlines()) == 6


def test_forced_retrieval_is_what_the_engine_retrieves_first(
    tiny: CoSupModel, index: FlatIndex, questions: list[Question]
) -> None:
    evaluation = evaluate_model(tiny, index, questions, options=Options(max_new_tokens=4, retrieve_first=True))
    for item in evaluation.items:
        assert item["retrieved"][0] == item["forced"]
        assert item["scores"]["cites"] == 1.0


def test_no_retrieval_counts_as_wrong_in_free_success(
    tiny: CoSupModel, index: FlatIndex, questions: list[Question]
) -> None:
    evaluation = evaluate_model(tiny, index, questions, options=Options(max_new_tokens=3, max_retrievals=0))
    assert evaluation.figures["free_success@5"] == Figure(0.0, 4)
    assert evaluation.figures["answer_accuracy"] == Figure(0.0, 4)
    assert evaluation.figures["claim_words"] == Figure(None, 0)


def test_bm25_finds_what_shares_its_words(tiny: CoSupModel, index: FlatIndex) -> None:
    asked = [Question("q", "squad", "What is the currency krone of Norway?", answers=["x"], gold=["p1", "p7"])]
    evaluation = evaluate_model(tiny, index, asked, options=Options(max_new_tokens=2))
    assert evaluation.figures["bm25_success@1"].value == 1.0


def test_ntp_loss_does_not_depend_on_batching(
    tiny: CoSupModel, passages: list[Passage], examples: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [tiny.template.render(example, {p.id: p for p in passages}) for example in examples]
    together = ntp_loss(tiny, rows)
    monkeypatch.setattr("cosup.evaluate.model._TOKENS_PER_BATCH", 1)
    alone = ntp_loss(tiny, rows)
    assert alone.count == together.count
    assert alone.value == pytest.approx(together.value, rel=1e-6)


def test_no_questions_and_dangling_gold_are_refused(tiny: CoSupModel, index: FlatIndex) -> None:
    with pytest.raises(UserError, match="there are no questions"):
        evaluate_model(tiny, index, [])
    with pytest.raises(UserError, match="cites passage 'p99'"):
        evaluate_model(tiny, index, [Question("q", "squad", "?", answers=["a"], gold=["p99"])])
