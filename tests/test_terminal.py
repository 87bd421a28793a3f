import io
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress

import pytest
from rich.console import Console
from transformers import TrainerState

from cosup import terminal
from cosup.data import Passage
from cosup.engine import ClaimClosed, ClaimOpened, Event, Finished, Inserted, Retrieved, Token
from cosup.index import Hit
from cosup.template import Claim, Response

EVIL = "\x1b[2Jgone [bold]not markup[/] \\"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    screen = io.StringIO()
    monkeypatch.setattr(terminal, "out", Console(file=screen, highlight=False, width=100))
    return screen


def events(text: str, *, closed: bool) -> Iterator[Event]:
    hit = Hit("p1", 0.5)
    yield Retrieved((hit,))
    yield Inserted("p1")
    yield ClaimOpened("p1")
    yield Token("passage that is not shown here", 1, inserted=True)
    yield Token(text, 2, inserted=False)
    if closed:
        yield ClaimClosed(0, len(text))
    yield Finished("stop", Response(text, (Claim(text, 0, len(text), "p1", 0.5),), retrieved=(("p1",),)))


@pytest.mark.parametrize("closed", [True, False])
def test_an_answer_is_shown_with_its_mark_its_number_and_its_passage(shown: io.StringIO, closed: bool) -> None:
    terminal.show_answer(events("Oslo", closed=closed), lambda ids: [Passage(id, "The text.", "Norway") for id in ids])
    lines = shown.getvalue().splitlines()
    assert lines[0].rstrip() == "⟨retrieves⟩ Oslo[1]"
    assert lines[2:] == ["[1] Norway p1, score 0.500", "The text."]


def test_what_models_and_documents_write_neither_steers_the_terminal_nor_is_markup(shown: io.StringIO) -> None:
    terminal.show_answer(events(EVIL, closed=True), lambda ids: [Passage("p1", EVIL, EVIL)])
    terminal.show_question(EVIL)
    terminal.show_hits([Hit("p1", 1.0)], [Passage("p1", EVIL, EVIL)])
    assert "\x1b" not in shown.getvalue()
    assert shown.getvalue().count("gone [bold]not markup[/] \\") == 6


def test_words_of_the_query_are_highlighted_in_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="standard", width=100)
    monkeypatch.setattr(terminal, "out", console)
    terminal.show_hits([Hit("p1", 0.5)], [Passage("p1", "Oslo, of Norway's towns.")], query="of norway, OSLO")
    text = screen.getvalue().splitlines()[1]
    assert re.findall("\x1b\\[1;33m(.*?)\x1b", text) == ["Oslo", "Norway"]


LOGS = {
    "ntp": 1.5,
    "nsp": 0.25,
    "accuracy": 0.5,
    "candidates": 16.0,
    "tokens_per_second": 1234.0,
    "minutes": 2.0,
    "progress": 0.25,
}
FIGURES = "step 7  ntp 1.500  nsp 0.250  accuracy 0.50 of 16  1,234 tokens/s"


def show_training(
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_terminal: bool,
    error: type[BaseException] | None = None,
    before: Sequence[dict[str, float]] = (),
) -> str:
    """What is written to a standard error of 80 columns when a training logs once, and then ends or breaks off."""
    screen = io.StringIO()
    monkeypatch.setattr(terminal, "err", Console(file=screen, force_terminal=is_terminal, width=80))
    with suppress(KeyboardInterrupt), terminal.training_bar() as bar:
        bar.on_train_begin(None, TrainerState(log_history=list(before)), None)
        bar.on_log(None, TrainerState(global_step=7), None, logs=LOGS)
        if error is not None:
            raise error
    return screen.getvalue()


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_training_shows_all_its_figures_in_80_columns_and_leaves_the_cursor_visible(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | None
) -> None:
    shown = show_training(monkeypatch, is_terminal=True, error=error)
    assert "6.0 min left" in shown
    assert FIGURES in shown
    assert "25%" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor is still hidden"


def test_counting_prints_one_line_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(terminal, "err", Console(file=screen))
    with terminal.counting("indexing", 12, unit="passages") as on_progress:
        on_progress(12)
    (line,) = screen.getvalue().splitlines()
    assert re.fullmatch(r"indexing: 12 passages, [\d,.]+ passages/s", line)


def test_a_training_prints_a_line_a_log_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert show_training(monkeypatch, is_terminal=False) == f"training  25%  {FIGURES}  6.0 min left\n"


def test_a_training_that_goes_on_tells_the_time_left_at_the_pace_it_has_now(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [{"minutes": 1.5, "progress": 0.05}, {"minutes": 1.5, "eval_loss": 1.0}]
    assert show_training(monkeypatch, is_terminal=False, before=before).endswith("  1.9 min left\n")
