"""The text of a PDF, page by page, as sentences and paragraphs run and not as lines were set."""

import logging
import re
from collections import Counter
from pathlib import Path

from cosup.config import UserError
from cosup.data.documents.sentences import sentences

_ENDS = re.compile(r"[.!?…:;][\"'\u201d\u2019»)\]]*$")
_HYPHEN = re.compile(r"(?<=[a-z])-\n(?=[a-z])")
_NUMBER = re.compile(r"(?:page\s*)?[-–\s]*\d+[-–\s]*(?:(?:of|/)\s*\d+)?", re.IGNORECASE)  # noqa: RUF001
_LEAST_PAGES = 4  # from which on a line that most of them share is taken for a running head


def read_pdf(path: Path) -> tuple[str, list[str]]:
    """A PDF's title, empty where it names none, and the text of each page.

    Running heads and page numbers are left out, words divided at the end of a line are joined, and a sentence that
    goes on over a page stands whole on the second.

    Raises:
        UserError: pypdf is not installed, the file is damaged or encrypted, or it holds no text, as a scan does.
    """
    try:
        import pypdf
        from pypdf.errors import PyPdfError
    except ImportError:
        raise UserError("PDF needs a package that is not installed: run `pip install 'cosup[pdf]'`") from None
    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it tells of every small flaw that it can read past
    try:
        reader = pypdf.PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise UserError(f"{path} is encrypted; save it without a password, or leave it out")
        title = (reader.metadata.title if reader.metadata else "") or ""
        lines = [_lines(page.extract_text()) for page in reader.pages]
    except (PyPdfError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        if isinstance(e, UserError):
            raise
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(f"{path} can't be read as PDF ({reason}); mend it, or leave it out") from e
    if not any(map(any, lines)):
        raise UserError(f"{path} holds no text, perhaps because it is a scan; run a text recognition over it first")
    return " ".join(title.split()), _carried([_flowing(page) for page in _without_heads(lines)])


def _lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.replace("\0", "").splitlines()]


def _without_heads(pages: list[list[str]]) -> list[list[str]]:
    """Drops page numbers, and what stands first or last on more than half of the pages but for its digits."""
    trimmed = [_trimmed(page) for page in pages]
    ends = Counter(_shape(line) for page in trimmed for line in {_shape(x): x for x in page[:1] + page[-1:]}.values())
    heads = {shape for shape, count in ends.items() if len(pages) >= _LEAST_PAGES and count > len(pages) / 2}
    return [
        [line for place, line in enumerate(page) if place not in (0, len(page) - 1) or _shape(line) not in heads]
        for page in trimmed
    ]


def _trimmed(page: list[str]) -> list[str]:
    """A page without blank lines and page numbers around it."""
    while page and (not page[0] or _NUMBER.fullmatch(page[0])):
        page = page[1:]
    while page and (not page[-1] or _NUMBER.fullmatch(page[-1])):
        page = page[:-1]
    return page


def _shape(line: str) -> str:
    return re.sub(r"\d+", "0", line.casefold())


def _flowing(page: list[str]) -> str:
    """Paragraphs parted by blank lines; also where a line ends a sentence well before the page's usual width."""
    width = sorted(len(line) for line in page)[len(page) * 3 // 4] if page else 0
    text = ""
    for line in page:
        ends = not line or (len(line) < 0.75 * width and bool(_ENDS.search(line)))
        text += line + ("\n\n" if ends else "\n")
    paragraphs = (" ".join(_HYPHEN.sub("", part).split()) for part in re.split(r"\n\s*\n", text))
    return "\n\n".join(part for part in paragraphs if part)


def _carried(pages: list[str]) -> list[str]:
    """Moves a sentence that a page leaves open to the start of the next."""
    out, open_sentence = [], ""
    for number, page in enumerate(pages):
        text = f"{open_sentence} {page}".strip() if page else open_sentence
        open_sentence = ""
        if text and number + 1 < len(pages) and pages[number + 1] and not _ENDS.search(text):
            open_sentence = sentences(text)[-1]
            text = text[: -len(open_sentence)].rstrip()
        out.append(text)
    return out
