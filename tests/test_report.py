import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cosup.config import UserError
from cosup.data import Passage, Question, write_records
from cosup.evaluate import Evaluation, Figure, PassageTexts, Prediction, judge, summarize
from cosup.report import conditions_of, read_run, write_report
from cosup.report.pictures import _COLOURS, emb_millions, lambda_of, pictures, points_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PASSAGES = [Passage("p0", "Oslo governs Norway.", "Norway"), Passage("p1", "Gold is </script><b>79</b>.", "Gold & <i>")]


def make_run(
    folder: Path, *, name: str, right: int, seed: int = 0, weight: float = 1.0, size: int = 10, ungrounded: int = 0
) -> Path:
    """A run over 20 questions, the first `right` of which it answers, `ungrounded` of these citing another passage."""
    questions = [Question(f"q{n}", "nq", f"Who governs {n}? <b>", answers=["Oslo"], gold=["p0"]) for n in range(20)]
    predictions = [
        Prediction(
            q.id, "So Oslo.", ["Oslo."], [[3, 8]], ["p1" if n < ungrounded else "p0"], [["p0", "p1"]], ["p0"], ["p1"],
            "stop", "", True,
        )
        if n < right
        else Prediction(q.id, reason="error", error="the prompt is too long")
        for n, q in enumerate(questions)
    ]  # fmt: skip
    texts = PassageTexts(lambda ids: [p for id in ids for p in PASSAGES if p.id == id])
    items = [judge(q, p, texts=texts) for q, p in zip(questions, predictions, strict=True)]
    (folder / "nq").mkdir(parents=True)
    Evaluation(summarize(items), items).write_into(folder / "nq")
    write_records(folder / "nq" / "passages.jsonl", PASSAGES)
    settings = {
        "name": name, "mode": "cosup", "model": "m", "created": "now", "index": {"passages": 2}, "tasks": {"nq": {}},
        "emb_parameters": size * 1_000_000, "training": {"seed": seed, "lambda": weight, "objective": "ntp+nsp"},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(settings))
    rows = [{"step": step, "ntp": 3 / step, "nsp": 2 / step, "accuracy": 1 - 1 / step} for step in range(1, 6)]
    (folder / "training.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def report(tmp_path: Path) -> Path:
    runs = [
        make_run(tmp_path / "a", name="base", right=5, weight=0.01),
        make_run(tmp_path / "b0", name="ours", right=15, size=20),
        make_run(tmp_path / "b1", name="ours", right=17, seed=1, size=20),
    ]
    write_report(runs, tmp_path / "out")
    return tmp_path / "out"


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def test_runs_of_one_name_are_one_condition_whose_figure_is_their_mean(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(n), name="ours", right=right) for n, right in enumerate((10, 20))]
    (condition,) = conditions_of([read_run(run) for run in runs])
    figure = condition.figure("nq", "answer_in_text")
    assert figure is not None
    assert (figure.value, figure.count) == (pytest.approx(0.75), 20)
    assert condition.scores("nq", "answer_in_text", condition.ids("nq", "answer_in_text")).shape == (2, 20)


def test_runs_of_one_name_that_differ_in_more_than_the_seed_are_refused(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(n), name="evaluations", right=5, weight=n + 1.0) for n in range(2)]
    with pytest.raises(UserError, match="are all named 'evaluations' and differ in training"):
        conditions_of([read_run(run) for run in runs])


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"index": {"passages": 50_871}}, "the passages that are searched"),
        ({"corpus": "other"}, "the passages that are searched"),
        ({"tasks": {"nq": {"sha256": "other"}}}, "the questions of nq"),
    ],
)
def test_runs_of_one_name_over_other_passages_or_questions_are_refused(
    tmp_path: Path, changed: dict[str, object], told: str
) -> None:
    runs = [make_run(tmp_path / str(n), name="eval", right=5, seed=n) for n in range(2)]
    for n, run in enumerate(runs):
        settings = json.loads((run / "run.json").read_text()) | {"corpus": "one"}
        (run / "run.json").write_text(json.dumps(settings | (changed if n else {})))
    with pytest.raises(UserError, match=f"are all named 'eval' and differ in {told}"):
        conditions_of([read_run(run) for run in runs])


def test_the_interval_of_several_seeds_is_that_of_their_mean(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(n), name="ours", right=10, seed=n) for n in range(2)]
    (condition,) = conditions_of([read_run(run) for run in runs])
    figure = condition.figure("nq", "answer_in_text")
    alone = condition.runs[0].evaluations["nq"].figures["answer_in_text"]
    assert figure is not None
    assert (figure.low, figure.high) == (alone.low, alone.high)  # two seeds that agree say what one says
    for item in condition.runs[1].evaluations["nq"].items:  # now they never agree: their mean is the same everywhere
        item["scores"]["answer_in_text"] = 1.0 - item["scores"]["answer_in_text"]
    opposite = condition.figure("nq", "answer_in_text")
    assert opposite is not None
    assert (opposite.low, opposite.high) == (0.5, 0.5)


def test_the_markdown_compares_conditions_and_says_what_was_not_run(report: Path) -> None:
    text = (report / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| NQ, ours: answer presence in the whole answer"))
    assert "+0.550" in row
    assert "| 20 | 1 and 2 |" in row
    assert float(row.split("|")[4]) < 0.01
    assert "citation recall (NLI): not run (no NLI model was named)." in text
    assert "MAUVE: not run" in text
    assert "| share of questions that failed | 0.750" in text


def test_a_figure_without_a_value_is_said_to_be_not_run_only_where_no_model_was_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", name="a", right=10)
    judged = {"citation_recall": {"value": 0.5, "count": 20}, "mauve": {"value": None, "count": 0}}
    figures = json.loads((run / "nq" / "figures.json").read_text()) | judged
    (run / "nq" / "figures.json").write_text(json.dumps(figures))
    write_report([run], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "claim recall (NLI): not measured (the questions bring no claims)." in text
    assert "MAUVE: not measured (it takes two questions with a long answer)." in text
    assert "citation precision (NLI): not run (no NLI model was named)." in text


def test_a_figure_that_one_seed_lacks_is_not_that_of_the_other(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(n), name="ours", right=10, seed=n) for n in range(2)]
    figures = json.loads((runs[1] / "nq" / "figures.json").read_text())
    (runs[1] / "nq" / "figures.json").write_text(json.dumps({k: v for k, v in figures.items() if k != "rouge_l"}))
    (condition,) = conditions_of([read_run(run) for run in runs])
    assert condition.figure("nq", "rouge_l") == Figure(None, 0)
    assert condition.figure("nq", "mauve") is None


def test_the_points_of_figures_4_and_5_are_means_over_seeds_at_the_size_and_the_weight(tmp_path: Path) -> None:
    """Of 20 questions, 5 are right at 10 million and lambda 0.01; 15 and 17 in two seeds at 20 million and 1."""
    made = [("a", "base", 5, 0, 0.01, 10), ("b0", "ours", 15, 0, 1.0, 20), ("b1", "ours", 17, 1, 1.0, 20)]
    runs = [
        make_run(tmp_path / place, name=name, right=right, seed=seed, weight=weight, size=size)
        for place, name, right, seed, weight, size in reversed(made)
    ]
    conditions = conditions_of([read_run(run) for run in runs])
    for x_of, low, high in ((emb_millions, 10.0, 20.0), (lambda_of, 0.01, 1.0)):
        points = points_of(conditions, "nq", "answer_in_text", x_of)
        assert points == [(low, pytest.approx(0.25)), (high, pytest.approx(0.8))]


def test_runs_that_lambda_or_emb_seq_has_no_part_in_are_left_out_of_figures_4_and_5(tmp_path: Path) -> None:
    alone, lexical = (make_run(tmp_path / name, name=name, right=5) for name in ("ntp", "bm25"))
    for run, change in ((alone, {"training": {"lambda": 1.0, "objective": "ntp"}}), (lexical, {"mode": "bm25"})):
        settings = json.loads((run / "run.json").read_text()) | change
        (run / "run.json").write_text(json.dumps(settings))
    one, other = conditions_of([read_run(alone), read_run(lexical)])
    assert (lambda_of(one), emb_millions(one)) == (None, 10.0)
    assert (lambda_of(other), emb_millions(other)) == (1.0, None)


def test_figure_3_says_the_share_of_right_answers_that_no_passage_that_was_read_holds(tmp_path: Path) -> None:
    """Of 20 questions 10 are answered rightly; of these, 4 by a passage that does not hold the answer: 4 / 10."""
    run = make_run(tmp_path / "a", name="a", right=10, ungrounded=4)
    figures = read_run(run).evaluations["nq"].figures
    assert figures["answer_in_text"] == Figure(0.5, 20)
    assert figures["answer_in_text_retrieved"] == Figure(0.3, 20)
    assert figures["reduction_rate"] == Figure(pytest.approx(0.4), 20)
    picture = pictures(conditions_of([read_run(run)]), ["nq"])[0]
    assert ">0.40<" in picture.svg
    wrong = make_run(tmp_path / "wrong", name="wrong", right=0)
    assert "nothing to lose" in pictures(conditions_of([read_run(wrong)]), ["nq"])[0].caption


def test_the_learning_curves_of_a_condition_have_one_colour_and_one_name(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(n), name="ours", right=5, seed=n) for n in range(2)]
    runs.append(make_run(tmp_path / "other", name="other", right=5))
    for number, run in enumerate(runs):
        rows = [{"step": step, "ntp": number + step, "nsp": 1.0, "accuracy": 0.5} for step in (1, 2)]
        (run / "training.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = pictures(conditions_of([read_run(run) for run in runs]), ["nq"])[3].svg
    lines = re.findall(r"clip-path[^>]*stroke: (#\w+)", drawn)
    assert [lines.count(colour) for colour in _COLOURS[:3]] == [6, 3, 0]
    assert (drawn.count(">ours<"), drawn.count(">other<")) == (1, 1)


def test_the_pictures_are_drawn_where_runs_differ_and_explained_where_not(report: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in report.glob("*.svg")) == [f"picture-{n}.svg" for n in (1, 2, 3, 4)]
    write_report([tmp_path / "a"], tmp_path / "alone")
    assert "these don't (lambda)" in (tmp_path / "alone" / "report.md").read_text()
    assert not (tmp_path / "alone" / "picture-3.svg").exists()


def test_the_page_needs_nothing_but_itself_and_its_data_cannot_leave_its_element(report: Path) -> None:
    page = (report / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    loaded = [v for tag, a in tags.seen for k, v in a.items() if k == "src" or (tag == "link" and k == "href")]
    assert loaded == []
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    data = json.loads(found.group(1))
    assert data["runs"] == ["base", "ours (seed 0)", "ours (seed 1)"]
    assert data["tasks"]["nq"]["passages"]["p1"][1] == PASSAGES[1].text
    assert "{{" not in page.replace(found.group(1), "")


def test_no_run_an_unfinished_one_and_one_named_twice_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no evaluation run"):
        write_report([tmp_path / "none"], tmp_path / "out")
    run = make_run(tmp_path / "a", name="a", right=1)
    with pytest.raises(UserError, match="named twice"):
        write_report([run, run], tmp_path / "out")
    curves = (run / "training.jsonl").read_text()
    (run / "training.jsonl").write_text(curves[:-9])  # as a kill leaves it
    with pytest.raises(UserError, match="or a damaged one"):
        write_report([run], tmp_path / "out")
    (run / "training.jsonl").write_text(curves)
    (run / "nq" / "figures.json").unlink()
    with pytest.raises(UserError, match="no finished data set"):
        write_report([run], tmp_path / "out")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine to render the page in")
def test_a_browser_sorts_filters_and_opens_questions(report: Path, tmp_path: Path) -> None:
    """The page runs in headless Chromium; a script beside it clicks as a reader would and writes down what it sees."""
    click = """<script>
      const seen = {};
      seen.rows = document.querySelectorAll("tr.row").length;
      $("show").value = "b"; $("show").onchange();
      seen.better = document.querySelectorAll("tr.row").length;
      document.querySelectorAll("#head button")[0].click(); document.querySelectorAll("#head button")[0].click();
      seen.first = document.querySelector("tr.row td").textContent;
      document.querySelector("tr.row").click();
      seen.open = document.querySelector(".sides").textContent;
      seen.cite = document.querySelector(".cite").textContent;
      $("words").value = "governs 7?"; $("words").oninput();
      seen.found = document.querySelectorAll("tr.row").length;
      const out = document.createElement("pre"); out.id = "seen"; out.textContent = JSON.stringify(seen);
      document.body.append(out);
    </script></body>"""
    page = tmp_path / "clicked.html"
    page.write_text((report / "report.html").read_text().replace("</body>", click))
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert found is not None, done.stderr[-2000:]
    seen = json.loads(found.group(1).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert (seen["rows"], seen["better"], seen["found"]) == (20, 10, 1)
    assert seen["first"] == "Who governs 9? <b>"
    assert "the prompt is too long" in seen["open"]
    assert "Oslo governs Norway." in seen["open"]
    assert seen["cite"] == "[1]"
