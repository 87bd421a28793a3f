"""Words beside the state: what a hybrid search finds, alone, in the engine and over the wire."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_index import FakeEmbedder, _vector

from cosup.config import UserError
from cosup.data import Passage, Question, write_records
from cosup.embedder import ModelEmbedder
from cosup.engine import Engine, Options
from cosup.evaluate import Evaluation, RunSettings, evaluate_model, evaluate_tasks, read_tasks
from cosup.evaluate.retrieval import QUESTION, QuestionIndex
from cosup.files import cache_folder
from cosup.index import BM25, FaissIndex, Hit, HybridIndex, build_index
from cosup.model import AnswerSettings, CoSupModel
from cosup.template import Template, TemplateSettings

COUNT = 300
QUERY_1D = _vector("what Gen thinks of")[None]


def _passages(numbers):
    return [
        Passage(f"p{n}", f"passage w{n} of v{n % 7} by u{n % 30}", meta={"side": "ab"[n % 2], "n": n}) for n in numbers
    ]


@pytest.fixture
def index(tmp_path):
    return build_index(_passages(range(COUNT)), FakeEmbedder(), tmp_path / "index")


@pytest.fixture
def hybrid(index):
    return HybridIndex(index)


def _search(hybrid, words, *, k=5, weight=0.5, **options):
    (hits,) = hybrid.search(QUERY_1D, k, words=[words], weight=weight, **options)
    return hits


def _expected(hybrid, words, weight, ids):
    """All passages, ranked as the docstring says."""
    shared = dict(zip([p.id for p in hybrid], hybrid.bm25.scores(words).tolist(), strict=True))
    most = max(shared.values()) or 1.0
    vectors_ND = hybrid.vectors(ids)
    near = dict(zip(ids, (vectors_ND @ QUERY_1D[0]).tolist(), strict=True))
    return sorted(ids, key=lambda id: -(near[id] + weight * shared[id] / most))


@pytest.mark.parametrize("words", ["w17", "v3 u4", "u29", "w250 v1", "passage"])
@pytest.mark.parametrize("weight", [0.1, 0.5, 3.0])
def test_the_best_by_both_are_found_wherever_either_search_ranks_them(hybrid, words, weight):
    found = [hit.id for hit in _search(hybrid, words, weight=weight, k=10)]
    assert found == _expected(hybrid, words, weight, [f"p{n}" for n in range(COUNT)])[:10]


def test_a_passage_far_from_the_state_is_found_by_its_words_and_told_with_the_states_score(index, hybrid):
    (everything,) = index.search(QUERY_1D, COUNT)
    last = everything[-1]
    first, *_ = _search(hybrid, f"w{last.id[1:]}", weight=3.0)
    assert first.id == last.id
    assert first.score == pytest.approx(last.score, abs=1e-6)


@pytest.mark.parametrize("words", ["", "the of and", "nothing that stands there"])
def test_words_that_no_passage_has_make_no_difference(index, hybrid, words):
    assert _search(hybrid, words) == index.search(QUERY_1D, 5)[0]


def test_without_weight_it_is_the_index(index, hybrid, monkeypatch):
    monkeypatch.setattr("cosup.index.hybrid.BM25", None)
    assert _search(hybrid, "w17", weight=0.0) == index.search(QUERY_1D, 5)[0]
    assert hybrid.search(QUERY_1D, 5) == index.search(QUERY_1D, 5)
    assert hybrid.search(QUERY_1D, 0, words=["w17"], weight=1.0) == [[]]


def test_each_query_has_its_own_words(hybrid):
    two = hybrid.search(np.vstack([QUERY_1D, -QUERY_1D]), 1, words=["w17", "w18"], weight=3.0)
    assert [hit.id for (hit,) in two] == ["p17", "p18"]


def test_where_holds_for_what_words_find_too(hybrid):
    assert _search(hybrid, "w17", weight=3.0, where={"side": "b"})[0].id == "p17"
    found = _search(hybrid, "w17 v3", weight=3.0, where={"side": "a"}, k=10)
    assert [hit.id for hit in found] == _expected(hybrid, "w17 v3", 3.0, [f"p{n}" for n in range(0, COUNT, 2)])[:10]
    assert [hit.id for hit in _search(hybrid, "w17", where={"n": 4.0})] == ["p4"]
    assert _search(hybrid, "w17", where={"n": -1}) == []


def test_with_where_words_look_as_far_as_it_takes(tmp_path):
    side = {"side": "b"}
    those = [Passage(f"p{n}", f"zebra stripes w{n}", meta={"side": "a"}) for n in range(150)]
    far = Passage("far", "zebra stripes in a longer text that others surpass", meta=side)
    others = [Passage(f"o{n}", f"passage w{n}", meta=side) for n in range(200)]
    hybrid = HybridIndex(build_index([*those, far, *others], FakeEmbedder(), tmp_path / "where"))
    away = -hybrid.vectors(["far"])
    (everything,) = hybrid.search(away, 201, where=side)
    assert everything[-1].id == "far"
    (hits,) = hybrid.search(away, 5, words=["zebra stripes"], weight=9.0, where=side)
    assert hits[0].id == "far"


def test_what_is_added_and_removed_is_found_and_found_no_more(hybrid):
    _search(hybrid, "w1")
    hybrid.add([Passage("new", "zebra")], FakeEmbedder().embed_passages([Passage("", "far")]))
    assert _search(hybrid, "zebra", weight=3.0)[0].id == "new"
    assert hybrid.remove(["new"]) == 1
    assert "new" not in {hit.id for hit in _search(hybrid, "zebra", weight=3.0, k=COUNT)}
    assert len(hybrid) == COUNT


@pytest.mark.parametrize("where", [None, {"side": "b"}])
def test_what_somebody_else_removes_is_no_error(index, hybrid, where):
    _search(hybrid, "w17")
    index.remove(["p17", "p19"])
    found = _search(hybrid, "w17 w19 w21", weight=3.0, where=where, k=COUNT)
    assert found[0].id == "p21"
    assert not {"p17", "p19"} & {hit.id for hit in found}


def test_an_empty_index_finds_nothing(index, hybrid):
    index.remove([f"p{n}" for n in range(COUNT)])
    assert _search(hybrid, "w17") == []


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_a_weight_that_ranks_nothing_is_refused(hybrid, weight):
    with pytest.raises(UserError, match="must be 0 or more"):
        _search(hybrid, "w17", weight=weight)


def test_it_is_wrapped_once(hybrid, index):
    assert HybridIndex.of(hybrid) is hybrid
    assert HybridIndex.of(index) is not index


def test_the_candidates_of_a_question_are_ranked_by_words_among_themselves(hybrid):
    own = [f"p{n}" for n in range(40, 60)]
    asked = QuestionIndex(hybrid, candidates={"q": own})
    (hits,) = asked.search(QUERY_1D, 20, where={QUESTION: "q"}, words=["w17 w41"], weight=3.0)
    assert hits[0].id == "p41"
    assert {hit.id for hit in hits} == set(own)
    assert asked.bm25 is hybrid.bm25


# Following changes


def test_a_passage_counted_in_scores_as_the_one_with_its_text_that_was_there():
    bm25 = BM25(_passages(range(COUNT)))
    bm25.add([Passage("again", "passage w17 of v3 by u17"), Passage("long", "passage w17 of v3 by u17 and much else")])
    for words in ("w17", "v3 u17 passage", "w17 w17", "w5"):
        scores = bm25.scores(words)
        assert bm25.of("again", scores) == pytest.approx(bm25.of("p17", scores), rel=1e-6)
    assert bm25.search(["w17"], 5) == [["p17", "again", "long"]]
    assert len(bm25) == COUNT + 2


def test_words_unknown_before_are_the_rarest():
    bm25 = BM25(_passages(range(COUNT)))
    bm25.add([Passage("new", "passage zebra"), Passage("other", "passage w17")])
    assert bm25.search(["w17 zebra"], 2) == [["new", "other"]]
    assert BM25([]).search(["zebra"], 1) == [[]]


def test_what_is_replaced_or_left_out_is_found_by_its_old_words_no_more():
    bm25 = BM25(_passages(range(COUNT)))
    bm25.add([Passage("p17", "zebra"), Passage("p17", "okapi")])
    bm25.remove(["p18", "nobody"])
    assert bm25.search(["w17", "zebra", "w18"], 3) == [[], [], []]
    assert bm25.search(["okapi"], 3) == [["p17"]]
    assert len(bm25) == COUNT - 1
    assert bm25.of("p18", bm25.scores("w18")) == 0


@pytest.mark.parametrize("base", [[], [Passage("silent", "?")]])
def test_a_corpus_without_words_can_grow_too(base):
    bm25 = BM25(base)
    bm25.add([Passage("a", "zebra"), Passage("b", "okapi zebra")])
    assert bm25.search(["okapi", "zebra"], 2) == [["b"], ["a", "b"]]
    assert bm25.outgrown


def test_one_that_was_changed_is_not_saved(tmp_path):
    changes = [
        lambda bm25: bm25.add([Passage("new", "zebra")]),
        lambda bm25: bm25.add([Passage("silent", "?")]),
        lambda bm25: bm25.remove(["p1"]),
    ]
    for change in changes:
        bm25 = BM25(_passages(range(COUNT)))
        change(bm25)
        with pytest.raises(ValueError, match="as it was made"):
            bm25.save(tmp_path)


def test_equal_scores_are_ranked_in_the_order_of_the_corpus_however_many_are_asked_for():
    bm25 = BM25([Passage(f"p{n}", "zebra" if n % 2 else "okapi") for n in range(40)])
    odd = [f"p{n}" for n in range(1, 40, 2)]
    for k in (1, 3, 19, 20, 100):
        assert bm25.search(["zebra"], k) == [odd[:k]]


@pytest.fixture
def remade(monkeypatch):
    """How often an index has made BM25 of itself."""
    times = []
    monkeypatch.setattr("cosup.index.hybrid.bm25_of", lambda index: times.append(len(index)) or BM25(list(index)))
    return times


def _add(hybrid, *passages):
    hybrid.add(passages, FakeEmbedder().embed_passages(passages))


def test_bm25_follows_changes_until_more_was_added_than_it_was_made_of(hybrid, remade):
    for n in range(COUNT, 2 * COUNT):
        _add(hybrid, *_passages([n]))
        assert _search(hybrid, f"w{n}", weight=3.0)[0].id == f"p{n}"
    hybrid.remove(["p17"])
    assert "p17" not in {hit.id for hit in _search(hybrid, "w17", weight=3.0, k=9)}
    assert remade == [COUNT + 1]  # asked for the first time after the first change
    _add(hybrid, *_passages(range(2 * COUNT, 2 * COUNT + 3)))
    assert _search(hybrid, f"w{2 * COUNT}", weight=3.0)[0].id == f"p{2 * COUNT}"
    assert remade == [COUNT + 1, 2 * COUNT + 2]


def test_bm25_is_made_anew_when_somebody_else_has_changed_as_many(index, hybrid, remade):
    _search(hybrid, "w17")
    other = FaissIndex(index.folder)
    other.add([Passage("p9", "gnu")], FakeEmbedder().embed_passages([Passage("p9", "gnu")]))
    _add(hybrid, Passage("new", "zebra"))
    assert _search(hybrid, "gnu", weight=3.0)[0].id == "p9"
    assert remade == [COUNT, COUNT + 1]


def test_parts_go_with_their_passage_and_what_a_duplicate_takes_over_is_found_by_its_words(tmp_path, remade):
    part = Passage("p#2", "zebra", meta={"parent": "p"})
    index = build_index([*_passages(range(9)), Passage("p", "okapi"), part], FakeEmbedder(), tmp_path / "parts")
    hybrid = HybridIndex(index)
    assert _search(hybrid, "zebra", weight=3.0)[0].id == "p#2"
    hybrid.remove(["p"])
    assert not {"p", "p#2"} & {hit.id for hit in _search(hybrid, "zebra okapi", weight=3.0, k=20)}
    assert remade == [11]
    index.change([], np.zeros((0, index.dim), np.float32), aliases={"twin": "p3"})
    hybrid.remove(["p3"])
    assert _search(hybrid, "w3", weight=3.0)[0].id == "twin"
    assert remade == [11, 9]


# In the engine


@pytest.fixture
def known(tiny: CoSupModel, passages: list[Passage], tmp_path: Path) -> FaissIndex:
    return build_index(passages, ModelEmbedder(tiny), tmp_path / "known")


FIRST = Options(retrieve_first=True, max_retrievals=1, max_new_tokens=3)


def test_the_words_of_the_question_and_not_of_the_instruction_are_looked_for(
    tiny: CoSupModel, known: FaissIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_for: list[str] = []
    scores = HybridIndex(known).bm25.scores
    monkeypatch.setattr("cosup.index.bm25.BM25.scores", lambda self, text: looked_for.append(text) or scores(text))
    t = tiny.template
    chat = [
        {"role": "user", "content": "Iron?"},
        {"role": "assistant", "content": "Fe."},
        {"role": "user", "content": "And gold?"},
    ]
    prompts = [t.prompt("Who governs Lima?", task="squad"), t.chat(chat)]
    Engine(tiny, known).generate(prompts, options=replace(FIRST, hybrid=0.5))
    assert [text.split() for text in looked_for] == [
        ["Who", "governs", "Lima?"],
        ["user:", "Iron?", "assistant:", "Fe.", "And", "gold?"],
    ]


def test_rows_with_and_without_words_search_beside_each_other(tiny: CoSupModel, known: FaissIndex) -> None:
    engine, asked = Engine(tiny, known), "Which number has gold?"
    plain, hybrid = engine.generate([asked] * 2, options=[FIRST, replace(FIRST, hybrid=9.0)])
    assert hybrid.retrieved[0][0] in ("p4", "p10")
    (alone,) = engine.generate([asked], options=FIRST)
    assert plain.retrieved == alone.retrieved
    assert plain.retrieved[0] != hybrid.retrieved[0]
    vectors = dict(zip(hybrid.retrieved[0], known.vectors(hybrid.retrieved[0]), strict=True))
    query_D = tiny.query([tiny.template.prompt(asked, task="")])[0]
    expected = [float(vectors[id] @ query_D) for id in hybrid.retrieved[0]]
    assert hybrid.scores[0] == pytest.approx(expected, abs=1e-5)


def test_a_later_search_has_the_words_of_the_answer_too(tiny: CoSupModel) -> None:
    from cosup.engine.row import Row

    t = tiny.template
    row = Row(0, t.prompt("Currency?", task=""), FIRST, template=t, limit=400)
    assert row.words.split() == ["Currency?"]
    row.read(len(row.unread))
    hit = row.choose([Hit("p0", 1.0)])
    assert hit is not None
    row.insert(hit, Passage("p0", "Norway is governed from Oslo.", "Norway"))
    for token in [*t.encode("Oslo"), t.ce]:
        row.write(token)
    assert row.words.split() == ["Currency?", "Oslo"], "what is written, and nothing of the passage"


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("{instruction}## Input:\n\n{question}## Output:\n\n", "Q?"),
        ("{question}\n", "Q?"),
        ("Question: {question}", "Q?"),
        ("{instruction}{question}", "Answer the question.Q?"),
        ("{question} {instruction}", "Q? Answer the question."),
    ],
)
def test_the_question_is_read_out_of_a_prompt(tiny: CoSupModel, layout: str, expected: str) -> None:
    settings = TemplateSettings(prompt=layout, default_instruction="Answer the question.")
    template = Template(tiny.template.tokenizer, settings=settings)
    assert template.asked(template.prompt("Q?", task="")).strip() == expected


def test_an_evaluation_is_of_the_hybrid_search_forced_and_free(
    tiny: CoSupModel, known: FaissIndex, questions: list[Question]
) -> None:
    evaluation = evaluate_model(tiny, known, questions, options=Options(max_new_tokens=3, hybrid=99.0))
    assert _found_by_words(known, questions, evaluation)


def _found_by_words(index: FaissIndex, questions: list[Question], evaluation: Evaluation) -> bool:
    """Whether each question's forced retrieval found one of those that BM25 has first."""
    bm25 = HybridIndex(index).bm25
    scores = [bm25.scores(question.question) for question in questions]
    first = [item["forced"][0] for item in evaluation.items]
    return all(bm25.of(id, scores_N) == scores_N.max() for id, scores_N in zip(first, scores, strict=True))


def test_a_weight_below_zero_and_words_for_bm25_are_refused() -> None:
    with pytest.raises(UserError, match="hybrid must be 0 or more, not -1"):
        Options(hybrid=-1)
    with pytest.raises(UserError, match="mode 'bm25' has none"):
        RunSettings("bm25", options=Options(hybrid=0.1))


def test_a_model_that_comes_with_a_weight_searches_by_words_unless_told_otherwise(
    tiny: CoSupModel, known: FaissIndex, questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny.settings
    (alone,) = Engine(tiny, known).generate(["Which number has gold?"], options=FIRST)
    monkeypatch.setattr(tiny, "settings", plain.model_copy(update={"answers": AnswerSettings(hybrid=99.0)}))
    engine = Engine(tiny, known)
    worded, told = engine.generate(["Which number has gold?"] * 2, options=[FIRST, replace(FIRST, hybrid=0.0)])
    assert engine.options.hybrid == 99.0
    assert worded.retrieved[0][0] in ("p4", "p10")
    assert told.retrieved == alone.retrieved
    write_records(tmp_path / "some.jsonl", questions)
    for mode, weight in {"cosup": 99.0, "bm25": 0.0}.items():
        settings = RunSettings(mode, options=Options(max_new_tokens=3))  # type: ignore[arg-type]
        found = evaluate_tasks(
            tiny, known, read_tasks([str(tmp_path / "some.jsonl")]), tmp_path / mode, settings=settings
        )
        assert json.loads((tmp_path / mode / "run.json").read_text())["options"]["hybrid"] == weight
        assert _found_by_words(known, questions, found["some"])


# Kept between processes


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The sizes of the corpora that BM25 was made of, where folders of 100 passages are worth keeping it."""
    sizes: list[int] = []

    class Counting(BM25):
        def __init__(self, passages: list[Passage]):
            sizes.extend([len(passages)] if passages else [])
            super().__init__(passages)

    monkeypatch.setattr("cosup.index.kept.BM25", Counting)
    monkeypatch.setattr("cosup.index.kept.WORTH_KEEPING", 100)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return sizes


def test_bm25_of_a_large_folder_is_made_once_for_each_of_its_states(
    index: FaissIndex, made: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "cosup.index.kept")
    first = _search(HybridIndex(index), "w17 v3")
    assert _search(HybridIndex(FaissIndex(index.folder)), "w17 v3") == first
    assert made == [COUNT]
    assert caplog.messages == [f"BM25 of {COUNT} passages is made, and kept for the next search"]
    hybrid = HybridIndex(index)
    new = Passage("new", "okapi " * 9)
    hybrid.add([new], FakeEmbedder().embed_passages([new]))
    assert _search(hybrid, "okapi", weight=9.0)[0].id == "new"
    assert _search(HybridIndex(FaissIndex(index.folder)), "okapi", weight=9.0)[0].id == "new"
    assert made == [COUNT, COUNT + 1]
    hybrid.remove(["new"])
    assert "new" not in [hit.id for hit in _search(HybridIndex(FaissIndex(index.folder)), "okapi", weight=9.0)]
    assert made == [COUNT, COUNT + 1, COUNT]


@pytest.mark.parametrize("name", ["kept.json", "passages.json", "vocab.index.json", "data.csc.index.npy"])
def test_a_damaged_copy_is_made_anew(index: FaissIndex, made: list[int], name: str) -> None:
    first = _search(HybridIndex(index), "w17 v3")
    (file,) = (cache_folder() / "bm25").glob(f"*/{name}")
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    for expected in ([COUNT] * 2, [COUNT] * 2):
        assert _search(HybridIndex(index), "w17 v3") == first
        assert made == expected


def test_what_another_process_puts_in_its_place_while_it_is_read_is_not_taken(
    index: FaissIndex, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _search(HybridIndex(index), "w17")
    old, load = FaissIndex(index.folder), BM25.load
    new = Passage("new", "okapi")
    index.add([new], FakeEmbedder().embed_passages([new]))

    def meanwhile(folder: Path) -> BM25:
        monkeypatch.setattr(BM25, "load", load)
        _search(HybridIndex(index), "w17")
        return load(folder)

    monkeypatch.setattr(BM25, "load", meanwhile)
    assert _search(HybridIndex(old), "w17", weight=9.0)[0].id == "p17"
    assert made == [COUNT, COUNT + 1, COUNT]


def test_bm25_of_a_folder_that_is_gone_is_kept_no_longer(index: FaissIndex, made: list[int], tmp_path: Path) -> None:
    _search(HybridIndex(index), "w17")
    other = build_index(_passages(range(COUNT)), FakeEmbedder(), tmp_path / "other")
    shutil.rmtree(index.folder)
    _search(HybridIndex(other), "w17")
    assert len(list((cache_folder() / "bm25").iterdir())) == 1


def test_without_a_home_nothing_is_kept(index: FaissIndex, made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert _search(HybridIndex(index), "w17", weight=9.0)[0].id == "p17"


def test_without_a_place_to_keep_it_or_a_word_in_the_corpus_it_is_made_each_time(
    made: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = [Passage(f"s{n}", "?" * (n + 1)) for n in range(120)]
    wordless = build_index(silent, FakeEmbedder(), tmp_path / "wordless")
    assert len(_search(HybridIndex(wordless), "w17")) == 5
    assert not list((cache_folder() / "bm25").iterdir())
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    index = build_index(_passages(range(COUNT)), FakeEmbedder(), tmp_path / "again")
    for _ in range(2):
        assert _search(HybridIndex(index), "w17 v3", weight=9.0)[0].id == "p17"
    assert made == [120, COUNT, COUNT]
