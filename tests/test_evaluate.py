import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cosup.config import UserError
from cosup.data import Passage, QAPair, Question, write_records
from cosup.engine import Options
from cosup.evaluate import (
    LABELS,
    MODES,
    Evaluation,
    Figure,
    PassageTexts,
    Prediction,
    RunSettings,
    Task,
    evaluate_model,
    evaluate_tasks,
    judge,
    ntp_loss,
    read_tasks,
    remove_run,
    summarize,
)
from cosup.evaluate.judge import statements
from cosup.evaluate.nli import entailment_label
from cosup.evaluate.predict import Asker
from cosup.evaluate.retrieval import QUESTION, QuestionIndex
from cosup.index import BM25, FaissIndex, build_index
from cosup.model import CoSupModel


@pytest.fixture
def index(tiny: CoSupModel, passages: list[Passage], tmp_path: Path) -> FaissIndex:
    return build_index(passages, tiny, tmp_path / "index")


def test_every_figure_has_its_count_and_equals_the_mean_of_its_items(
    tiny: CoSupModel, index: FaissIndex, questions: list[Question], tmp_path: Path
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
    tiny: CoSupModel, index: FaissIndex, questions: list[Question]
) -> None:
    evaluation = evaluate_model(tiny, index, questions, options=Options(max_new_tokens=4, retrieve_first=True))
    for item in evaluation.items:
        assert item["retrieved"][0] == item["forced"]
        assert item["scores"]["cites"] == 1.0


@pytest.mark.parametrize("retrieve_first", [True, False])
def test_forced_retrieval_is_by_the_state_at_a_ret_right_after_the_prompt(
    tiny: CoSupModel, index: FaissIndex, questions: list[Question], retrieve_first: bool
) -> None:
    options = Options(max_new_tokens=4, retrieve_first=retrieve_first)
    evaluation = evaluate_model(tiny, index, questions, options=options)
    queries_QD = tiny.query([tiny.template.prompt(question.question, task=question.task) for question in questions])
    found = index.search(queries_QD, 20)
    assert [item["forced"] for item in evaluation.items] == [[hit.id for hit in hits] for hits in found]


def test_no_retrieval_counts_as_wrong_in_free_success(
    tiny: CoSupModel, index: FaissIndex, questions: list[Question]
) -> None:
    evaluation = evaluate_model(tiny, index, questions, options=Options(max_new_tokens=3, max_retrievals=0))
    assert evaluation.figures["free_success@5"] == Figure(0.0, 4)
    assert evaluation.figures["answer_accuracy"] == Figure(0.0, 4)
    assert evaluation.figures["claim_words"] == Figure(None, 0)


def test_bm25_finds_what_shares_its_words(tiny: CoSupModel, index: FaissIndex) -> None:
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


def test_no_questions_and_dangling_gold_are_refused(tiny: CoSupModel, index: FaissIndex) -> None:
    with pytest.raises(UserError, match="there are no questions"):
        evaluate_model(tiny, index, [])
    with pytest.raises(UserError, match="cites passage 'p99'"):
        evaluate_model(tiny, index, [Question("q", "squad", "?", answers=["a"], gold=["p99"])])


class FakeNli:
    """Entails where the hypothesis is part of the premise; counts what it was asked."""

    name = "fake"

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def entails(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        self.asked += pairs
        return [hypothesis in premise for premise, hypothesis in pairs]


@pytest.fixture
def task(questions: list[Question], tmp_path: Path) -> Task:
    write_records(tmp_path / "mixed.jsonl", questions)
    (task,) = read_tasks([str(tmp_path / "mixed.jsonl")])
    return task


FEW = RunSettings(options=Options(max_new_tokens=6, retrieve_first=True))


def test_a_stopped_run_goes_on_without_asking_again_and_ends_as_an_uninterrupted_one(
    tiny: CoSupModel, index: FaissIndex, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate_tasks(tiny, index, [task], tmp_path / "whole", settings=FEW)["mixed"]
    evaluate_tasks(tiny, index, [task], tmp_path / "cut", settings=FEW)
    path = tmp_path / "cut" / "mixed" / "predictions.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:20])  # as a kill leaves it
    asked: list[str] = []
    real = Asker.predict
    monkeypatch.setattr(Asker, "predict", lambda self, left: asked.extend(q.id for q in left) or real(self, left))
    resumed = evaluate_tasks(tiny, index, [task], tmp_path / "cut", settings=FEW)["mixed"]
    assert len(asked) == 2
    assert resumed == whole


def test_a_run_does_not_go_on_over_another_corpus_of_the_same_size(
    tiny: CoSupModel, index: FaissIndex, task: Task, passages: list[Passage], tmp_path: Path
) -> None:
    first = evaluate_tasks(tiny, index, [task], tmp_path / "run", settings=FEW)["mixed"]
    other = [replace(p, text=f"{p.text} Or not.") if p.id == "p5" else p for p in passages]
    with pytest.raises(UserError, match="another corpus"):
        evaluate_tasks(tiny, build_index(other, tiny, tmp_path / "other"), [task], tmp_path / "run", settings=FEW)
    same = build_index(passages[::-1], tiny, tmp_path / "same")
    assert evaluate_tasks(tiny, same, [task], tmp_path / "run", settings=FEW)["mixed"] == first
    kept = json.loads((tmp_path / "run" / "run.json").read_text())
    del kept["corpus"]  # as one was that an earlier version began
    (tmp_path / "run" / "run.json").write_text(json.dumps(kept))
    assert evaluate_tasks(tiny, index, [task], tmp_path / "run", settings=FEW)["mixed"] == first


def test_what_failed_is_asked_again(tiny: CoSupModel, index: FaissIndex, task: Task, tmp_path: Path) -> None:
    whole = evaluate_tasks(tiny, index, [task], tmp_path / "run", settings=FEW)["mixed"]
    path = tmp_path / "run" / "mixed" / "predictions.jsonl"
    lines = path.read_text().splitlines()
    failed = [json.dumps({"id": json.loads(line)["id"], "reason": "error", "error": "away"}) for line in lines[:2]]
    path.write_text("\n".join([*failed, *lines[2:], ""]))
    assert evaluate_tasks(tiny, index, [task], tmp_path / "run", settings=FEW)["mixed"] == whole
    assert len(path.read_text().splitlines()) == len(lines) + 2


def test_a_place_that_holds_no_run_is_told(tiny: CoSupModel, index: FaissIndex, task: Task, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep")
    with pytest.raises(UserError, match="is a file, and a run is a folder"):
        evaluate_tasks(tiny, index, [task], tmp_path / "file", settings=FEW)
    with pytest.raises(UserError, match="is a file, and a run is a folder"):
        remove_run(tmp_path / "file")
    (tmp_path / "run").mkdir()
    for damaged in ("{", "[]", '{"tasks": {}}'):
        (tmp_path / "run" / "run.json").write_text(damaged)
        with pytest.raises(UserError, match=r"run\.json is damaged"):
            evaluate_tasks(tiny, index, [task], tmp_path / "run", settings=FEW)
        with pytest.raises(UserError, match=r"run\.json is damaged"):
            remove_run(tmp_path / "run")


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_an_uninterrupted_one_and_asks_nothing_twice(
    tiny_folder: Path, passages: list[Passage], tmp_path: Path
) -> None:
    """The command itself, stopped by SIGKILL while it asks and while it judges, once with half a line written."""
    model = CoSupModel.load(tiny_folder, device="cpu")
    build_index(passages, model, tmp_path / "index")
    asked = [
        Question(f"q{n}", "squad", f"Which city governs {n}?", answers=["Oslo"], gold=["p0"])
        for n in range(SLOW_QUESTIONS)
    ]
    write_records(tmp_path / "asked.jsonl", asked)
    command = [
        sys.executable, "-c", "from cosup.cli import main; main()", "evaluate", "--model", str(tiny_folder),
        "--index", str(tmp_path / "index"), "--tasks", str(tmp_path / "asked.jsonl"), "--out",
    ]  # fmt: skip
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    whole, cut = (tmp_path / name / "asked" for name in ("whole", "cut"))
    path, draw, kept, stops = cut / "predictions.jsonl", random.Random(0), b"", list[int]()
    for target in [*sorted(draw.sample(range(1, SLOW_QUESTIONS), 4)), SLOW_QUESTIONS]:
        kill_after(lambda target=target: lines_in(path) >= target, [*command, str(tmp_path / "cut")])
        written = path.read_bytes()
        assert written.startswith(kept)
        kept = written[: written.rfind(b"\n") + 1]
        stops.append(kept.count(b"\n"))
        if target < SLOW_QUESTIONS:
            path.write_bytes(kept + b'{"id": "q')
    subprocess.run([*command, str(tmp_path / "cut")], check=True, capture_output=True)
    assert path.read_bytes() == kept
    assert sum(stop < SLOW_QUESTIONS for stop in stops) > 1, stops
    for name in ("items.jsonl", "figures.json", "passages.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(kept.splitlines()) == sorted((whole / "predictions.jsonl").read_bytes().splitlines())


SLOW_QUESTIONS = 48


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_after(reached: Callable[[], bool], command: Sequence[str]) -> None:
    """Starts a command and kills it as soon as something is reached; it may have ended by itself by then."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not reached():
            time.sleep(0.001)
        process.kill()


def test_a_finished_run_can_be_judged_again_and_a_run_of_another_kind_is_refused(
    tiny: CoSupModel, tiny_folder: Path, index: FaissIndex, task: Task, tmp_path: Path
) -> None:
    first = evaluate_tasks(tiny, index, [task], tmp_path / "run", settings=FEW)["mixed"]
    assert "citation_recall" not in first.figures
    nli = FakeNli()
    judged = evaluate_tasks(tiny, index, [task], tmp_path / "run", settings=FEW, nli=nli)["mixed"]
    assert judged.figures["citation_recall"].count == 4
    assert len(nli.asked) == len(set(nli.asked)) > 0
    again = FakeNli()
    assert evaluate_tasks(tiny, index, [task], tmp_path / "run", settings=FEW, nli=again)["mixed"] == judged
    assert again.asked == []
    kept = json.loads((tmp_path / "run" / "run.json").read_text())
    del kept["options"]["quote"]  # as one was that an earlier version began
    (tmp_path / "run" / "run.json").write_text(json.dumps(kept))
    assert evaluate_tasks(tiny, index, [task], tmp_path / "run", settings=FEW, nli=again)["mixed"] == judged
    quoting = replace(FEW, options=replace(FEW.options, quote=True))
    with pytest.raises(UserError, match="another options"):
        evaluate_tasks(tiny, index, [task], tmp_path / "run", settings=quoting)
    with pytest.raises(UserError, match="another mode"):
        evaluate_tasks(tiny, index, [task], tmp_path / "run", settings=RunSettings("static", options=FEW.options))
    other = CoSupModel.load(tiny_folder, dtype="float64", device="cpu")
    with torch.no_grad():
        other.gen.model.norm.weight.mul_(2.0)  # Emb_seq, and so the index, are the same
    with pytest.raises(UserError, match="another gen"):
        evaluate_tasks(other, index, [task], tmp_path / "run", settings=FEW)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="holds no evaluation run"):
        remove_run(tmp_path / "mine")
    with pytest.raises(UserError, match="holds something else than an evaluation run"):
        evaluate_tasks(tiny, index, [task], tmp_path / "mine", settings=FEW)
    (tmp_path / "run" / "thesis.tex").write_text("keep")
    with pytest.raises(UserError, match=r"thesis.tex is no part of an evaluation run"):
        remove_run(tmp_path / "run")
    assert (tmp_path / "run" / "run.json").is_file()
    (tmp_path / "run" / "thesis.tex").unlink()
    remove_run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_modes_retrieve_as_they_say(tiny: CoSupModel, index: FaissIndex, task: Task, tmp_path: Path) -> None:
    found = {
        mode: evaluate_tasks(
            tiny, index, [task], tmp_path / mode, settings=RunSettings(mode, options=Options(max_new_tokens=4))
        )["mixed"]
        for mode in MODES
    }
    assert all(item["retrieved"] == [] and item["forced"] == [] for item in found["none"].items)
    assert found["none"].figures["forced_success@1"] == Figure(None, 0)  # it was not tried
    assert found["none"].figures["free_success@1"] == Figure(0.0, 4)
    assert all(item["retrieved"][0] == item["forced"] for item in found["static"].items)
    asked = [question.question for question in task.questions]
    for item, ranked in zip(found["bm25"].items, BM25(list(index)).search(asked, 20), strict=True):
        assert item["forced"] == ranked
        assert item["cited"] == ranked[:1]


def test_a_question_with_candidates_finds_nothing_else(
    tiny: CoSupModel, index: FaissIndex, questions: list[Question], tmp_path: Path
) -> None:
    own = [replace(q, candidates=["p5", *q.gold, "p11"]) for q in questions]
    write_records(tmp_path / "own.jsonl", own)
    tasks = read_tasks([str(tmp_path / "own.jsonl")])
    settings = RunSettings("static", options=Options(max_new_tokens=3))
    for item, question in zip(
        evaluate_tasks(tiny, index, tasks, tmp_path / "a", settings=settings)["own"].items, own, strict=True
    ):
        assert set(item["forced"]) == set(question.candidates)
        assert item["retrieved"][0] == item["forced"]
    whole = replace(settings, own_candidates=False)
    items = evaluate_tasks(tiny, index, tasks, tmp_path / "b", settings=whole)["own"].items
    assert all(len(item["forced"]) == 12 for item in items)
    write_records(tmp_path / "bad.jsonl", [replace(own[0], candidates=["nowhere"])])
    with pytest.raises(UserError, match="may choose from passage 'nowhere'"):
        evaluate_tasks(tiny, index, read_tasks([str(tmp_path / "bad.jsonl")]), tmp_path / "c", settings=settings)


def test_candidates_are_ranked_as_in_the_whole_corpus(tiny: CoSupModel, index: FaissIndex) -> None:
    query_1D = tiny.query([tiny.template.prompt("gold", task="")])
    (whole,) = index.search(query_1D, 12)
    wrapped = QuestionIndex(index, candidates={"q": ["p7", "p2", "p9"]})
    (own,) = wrapped.search(query_1D, 2, where={QUESTION: "q"})
    assert [hit.id for hit in own] == [hit.id for hit in whole if hit.id in ("p7", "p2", "p9")][:2]
    assert wrapped.search(query_1D, 12)[0] == whole


def test_a_question_that_fails_is_counted_and_scores_zero(tiny: CoSupModel, index: FaissIndex) -> None:
    asked = [
        Question("long", "nq", "word " * 600, answers=["Oslo"], gold=["p0"]),
        Question("short", "nq", "Which?", answers=["Oslo"], gold=["p0"]),
    ]
    evaluation = evaluate_model(tiny, index, asked, options=Options(max_new_tokens=3))
    assert evaluation.items[0]["reason"] == "error"
    assert "shorten the prompt" in evaluation.items[0]["error"]
    assert evaluation.figures["failed"] == Figure(0.5, 2)
    for name, figure in evaluation.figures.items():
        if name not in ("claim_words", "ntp", "reduction_rate"):
            assert figure.count in (0, 2), name


def judged(question: Question, prediction: Prediction) -> dict[str, float]:
    corpus = {
        "n#1": Passage("n#1", "Oslo governs Norway.", "Norway", {"page": "n"}),
        "n#2": Passage("n#2", "The krone is its money.", "Norway", {"page": "n"}),
        "g#1": Passage("g#1", "Gold is 79.", "Gold"),
        "long": Passage("long", "Peru is long.", "Peru", {"parent": "long"}),
        "long#2": Passage("long#2", "Lima governs it.", "Peru", {"parent": "long"}),
        "piece": Passage("piece", "Fe is iron.", "Manual B", {"parent": "document", "page": 3}),
    }
    corpus["twin"] = corpus["g#1"]
    texts = PassageTexts(lambda ids: [corpus[id] for id in ids])
    scores: dict[str, float] = judge(question, prediction, texts=texts, labels=["SUPPORTS", "REFUTES"])["scores"]
    return scores


def test_an_answer_that_no_read_passage_holds_counts_as_reliance_on_parametric_knowledge() -> None:
    question = Question("q", "nq", "?", answers=["Oslo"], gold=["n#1"])
    spans = [[0, 4]]
    grounded = judged(question, Prediction("q", "Oslo", ["Oslo"], spans, ["n#1"]))
    known = judged(question, Prediction("q", "Oslo", ["Oslo"], spans, ["g#1"]))
    assert (grounded["answer_in_text"], grounded["answer_in_text_retrieved"], grounded["grounded_claims"]) == (1, 1, 1)
    assert (known["answer_in_text"], known["answer_in_text_retrieved"], known["grounded_claims"]) == (1, 0, 0)
    items = [{"scores": scores, "claims": ["Oslo"]} for scores in (grounded, known)]
    assert summarize(items)["reduction_rate"] == Figure(0.5, 2)


def test_retrieval_is_judged_by_page_and_by_answer_where_no_passage_is_gold() -> None:
    retrieved = [["n#2", "g#1", "n#1"]]
    paged = judged(Question("q", "nq", "?", pages=["n"]), Prediction("q", retrieved=retrieved))
    assert (paged["free_page_success@1"], paged["free_page_r_precision"]) == (1.0, 1.0)
    assert "free_success@1" not in paged
    by_answer = judged(Question("q", "zsre", "?", answers=["79"]), Prediction("q", retrieved=retrieved))
    assert (by_answer["free_answer_success@1"], by_answer["free_answer_mrr"]) == (0.0, 0.5)
    assert by_answer["forced_answer_success@20"] == 0.0


def test_gold_by_passage_is_left_out_where_the_corpus_is_cut_otherwise_and_the_page_is_known() -> None:
    prediction = Prediction("q", "Oslo", ["Oslo"], [[0, 4]], ["n#1"], forced=["n#1"], retrieved=[["n#1"]])
    scores = judged(Question("q", "nq", "?", answers=["Oslo"], gold=["n#9"], pages=["n"]), prediction)
    assert (scores["free_page_success@1"], scores["forced_page_success@1"]) == (1.0, 1.0)
    assert not {"free_success@1", "forced_success@1", "bm25_success@1", "cited_precision", "cited_recall"} & set(scores)
    one_of_two = judged(Question("q", "nq", "?", answers=["Oslo"], gold=["n#9", "n#1"], pages=["n"]), prediction)
    assert (one_of_two["free_success@1"], one_of_two["cited_recall"]) == (1.0, 1.0)


def test_a_gold_passage_counts_under_the_id_that_the_index_has_it_by() -> None:
    for gold, held in (("twin", "g#1"), ("piece", "piece")):  # a duplicate, and a piece of a document
        prediction = Prediction("q", "79", ["79"], [[0, 2]], [held], forced=[held], retrieved=[[held]])
        scores = judged(Question("q", "nq", "?", answers=["79"], gold=[gold]), prediction)
        assert (scores["forced_success@1"], scores["free_success@1"]) == (1.0, 1.0)
        assert (scores["cited_precision"], scores["cited_recall"]) == (1.0, 1.0)


def test_the_number_of_a_page_in_a_pdf_is_no_page_of_its_own() -> None:
    manual = judged(Question("q", "nq", "?", pages=["Manual B"]), Prediction("q", retrieved=[["piece"]]))
    numbered = judged(Question("q", "nq", "?", pages=["3"]), Prediction("q", retrieved=[["piece"]]))
    assert (manual["free_page_success@1"], numbered["free_page_success@1"]) == (1.0, 0.0)


def test_a_full_stop_behind_a_claim_is_no_statement_of_its_own() -> None:
    texts = PassageTexts(lambda ids: [Passage("p", "Oslo governs.", "Norway") for _ in ids])
    item = {"text": "Oslo governs. So it is.", "claims": ["Oslo governs"], "spans": [[0, 12]], "cited": ["p"]}
    assert [statement.text for statement in statements(item, texts)] == ["Oslo governs", "So it is."]


def test_a_part_of_a_gold_passage_that_indexing_split_is_gold_and_its_parts_count_once() -> None:
    retrieved = [["long#2", "long", "n#1"]]
    prediction = Prediction("q", "Lima", ["Lima"], [[0, 4]], ["long#2"], forced=["g#1", "long#2"], retrieved=retrieved)
    scores = judged(Question("q", "nq", "?", answers=["Lima"], gold=["long"]), prediction)
    assert (scores["free_success@1"], scores["forced_success@1"], scores["forced_success@5"]) == (1.0, 0.0, 1.0)
    assert (scores["free_precision@1"], scores["cited_precision"], scores["cited_recall"]) == (1.0, 1.0, 1.0)
    second = judged(Question("q", "nq", "?", gold=["n#1"]), prediction)
    assert second["free_mrr"] == 0.5


def test_verdicts_and_readings_are_judged_by_their_own_rules() -> None:
    claim = Question("q", "fever", "?", answers=["REFUTES"], label="REFUTES")
    assert judged(claim, Prediction("q", "It refutes."))["label_accuracy[REFUTES]"] == 1.0
    assert judged(claim, Prediction("q", "supports or refutes"))["label_accuracy"] == 0.0
    pairs = [QAPair("a", ["Oslo"]), QAPair("b", ["krone"])]
    readings = Question("q", "asqa", "?", answers=["Oslo", "krone"], qa_pairs=pairs, long_answers=["Oslo it is"])
    scores = judged(readings, Prediction("q", "Oslo it is"))
    assert (scores["string_em"], scores["string_em_hit"], scores["rouge_l"]) == (0.5, 0.0, 1.0)


def test_the_text_around_claims_is_judged_as_citing_nothing() -> None:
    item = {
        "text": "It is so. Oslo. Is it?", "spans": [[10, 15]], "claims": ["Oslo."], "cited": ["p"],
    }  # fmt: skip
    texts = PassageTexts(lambda ids: [Passage("p", "Oslo governs.", "Norway") for _ in ids])
    found = statements(item, texts)
    assert [s.text for s in found] == ["It is so.", "Oslo.", "Is it?"]
    assert [len(s.passages) for s in found] == [0, 1, 0]


def test_an_nli_classifier_needs_one_entailment_label() -> None:
    def config(kind: str, **labels: str) -> SimpleNamespace:
        return SimpleNamespace(architectures=[kind], id2label={int(n[1:]): label for n, label in labels.items()})

    assert entailment_label(config("BertForSequenceClassification", _0="neutral", _1="Entailment")) == 1
    assert entailment_label(config("X" + "ForSequenceClassification", _0="entailment", _1="not_entailment")) == 0
    assert entailment_label(config("T5ForConditionalGeneration")) is None
    with pytest.raises(UserError, match="no entailment label among good, bad"):
        entailment_label(config("BertForSequenceClassification", _0="good", _1="bad"))
    with pytest.raises(UserError, match="must classify pairs"):
        entailment_label(config("LlamaForCausalLM"))


def test_data_sets_are_found_by_name_and_repeated_names_are_refused(tmp_path: Path, questions: list[Question]) -> None:
    for place in ("dev", "other"):
        write_records(tmp_path / place / "nq.jsonl.gz", questions)
    (task,) = read_tasks(["nq"], data=tmp_path, limit=2)
    assert (task.name, len(task.questions)) == ("nq", 2)
    with pytest.raises(UserError, match="would share a folder"):
        read_tasks([f"nq,{tmp_path / 'other' / 'nq.jsonl.gz'}"], data=tmp_path)
    with pytest.raises(UserError, match="no data set 'fever'"):
        read_tasks(["fever"], data=tmp_path)


def test_bm25_reads_the_corpus_once_for_all_data_sets(
    tiny: CoSupModel, index: FaissIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []

    class Counting(BM25):
        def __init__(self, passages: list[Passage]):
            built.append(len(passages))
            super().__init__(passages)

    monkeypatch.setattr("cosup.index.kept.BM25", Counting)
    tasks = [Task(name, tmp_path / name, [Question(name, name, "river?", ["Oder"], ["p0"])]) for name in ("a", "b")]
    for task in tasks:
        task.path.write_text("{}")
    evaluate_tasks(tiny, index, tasks, tmp_path / "run", settings=FEW)
    assert built == [len(index)]
