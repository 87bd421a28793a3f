"""The page, in a headless browser."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_serve import running

from cosup.data import Passage
from cosup.engine import Engine, Options
from cosup.index import FaissIndex, build_index
from cosup.model import CoSupModel

pytestmark = pytest.mark.slow
EVIL = "<script>document.title = 'broken'</script><img src=x onerror=\"document.title='broken'\">"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]


@pytest.fixture
def address(tiny: CoSupModel, tmp_path: Path) -> Iterator[str]:
    build_index([Passage("evil", EVIL, EVIL)], tiny, tmp_path / "index")
    with running(Engine(tiny, FaissIndex(tmp_path / "index"), Options(rows=2))) as address:
        yield address


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine: install Debian's package chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 360, "height": 700})
        troubles: list[str] = []
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto(address)
        yield page
        browser.close()
    assert [trouble for trouble in troubles if "400 (Bad Request)" not in trouble] == []


def test_an_answer_streams_and_its_citation_opens_the_passage_as_text(page: Any) -> None:
    page.click("summary")
    page.check("#retrieve_first")
    page.fill("#max_tokens", "8")
    page.fill("#question", "Which city?")
    page.keyboard.press("Enter")
    page.click(".cite")
    page.wait_for_selector("#passage[open]")
    assert page.text_content("#text") == EVIL
    assert page.text_content("#title") == EVIL
    assert page.title() == "cosup"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.keyboard.press("Escape")
    page.wait_for_selector("#status:has-text('Answered with 1 citation')")
    assert page.text_content(".ret") == "searched"
    assert page.text_content("#candidates h3") == "Search 1"
    assert page.text_content("#history li") == "Which city?"


def test_the_answer_grows_while_it_is_written(page: Any) -> None:
    page.evaluate(
        """() => {
            window.seen = [];
            const note = () => window.seen.push([document.getElementById("answer").textContent.length,
                                                 document.getElementById("status").textContent]);
            new MutationObserver(note).observe(document.getElementById("answer"), {childList: true});
        }"""
    )
    page.click("summary")
    page.fill("#max_tokens", "8")
    page.fill("#question", "Which city?")
    page.keyboard.press("Enter")
    page.wait_for_selector("#status:has-text('Answered')")
    seen = page.evaluate("window.seen")
    assert {status for _, status in seen} == {"Answering…"}
    lengths = [length for length, _ in seen]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 2


def test_words_of_the_claim_are_marked_but_not_those_that_say_nothing(page: Any) -> None:
    page.evaluate("open('evil', 'The broken img of 2')")
    page.wait_for_selector("#passage[open]")
    assert page.locator("#text mark").all_text_contents() == ["broken", "img", "broken"]
    page.keyboard.press("Escape")
    assert not page.is_visible("#passage")


def test_a_dark_screen_is_dark_and_its_text_light(page: Any) -> None:
    colours = "['background-color', 'color'].map((name) => getComputedStyle(document.body).getPropertyValue(name))"
    brightness: dict[str, list[int]] = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        brightness[scheme] = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in page.evaluate(colours)]
    assert brightness["light"][0] > 3 * 200 > 3 * 60 > brightness["light"][1]
    assert brightness["dark"][1] > 3 * 200 > 3 * 60 > brightness["dark"][0]


def test_an_error_is_told(page: Any) -> None:
    page.click("summary")
    page.fill("#max_tokens", "99999")
    page.fill("#question", "Which city?")
    page.evaluate("document.getElementById('form').requestSubmit()")
    page.wait_for_selector("#error:not([hidden])")
    assert "max_tokens" in page.text_content("#error")
    assert not page.is_visible("#answer")
    assert not page.is_visible("#retrievals")
