"""What becomes of passages before they are embedded: each text once, and none too long for the model."""

import hashlib
import logging
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from cosup.config import UserError
from cosup.data import Passage
from cosup.data.documents.sentences import sentences
from cosup.index.protocol import Embedder, MeasuringEmbedder

log = logging.getLogger(__name__)


@dataclass
class Prepared:
    """Passages ready to be embedded, in order; counts what happened to them.

    Args:
        passages: with distinct ids.
        embedder: one that can measure has long passages split; another may shorten them.

    Attributes:
        aliases: ids of duplicates, with the id of the passage that stands for them.
        split: how many passages were longer than the embedder reads.
    """

    passages: Iterable[Passage]
    embedder: Embedder
    aliases: dict[str, str] = field(default_factory=dict)
    split: int = 0

    def __iter__(self) -> Iterator[Passage]:
        measuring = self.embedder if isinstance(self.embedder, MeasuringEmbedder) else None  # costly to ask each time
        for passage in self._distinct():
            pieces = _pieces(passage, measuring) if measuring else [passage]
            self.split += len(pieces) > 1
            yield from pieces
        if self.split:
            log.info("%s passages were longer than the model reads, and were split on sentences", f"{self.split:,}")
        if self.aliases:
            log.info("%s passages say the same as another, which stands for them", f"{len(self.aliases):,}")

    def _distinct(self) -> Iterator[Passage]:
        ids: set[int] = set()
        first: dict[int, str] = {}
        for passage in self.passages:
            key = _hash(passage.id)
            if key in ids:
                raise UserError(f"two passages have the id {passage.id!r}; ids must be distinct")
            ids.add(key)
            standing = first.setdefault(_hash(normalised(passage)), passage.id)
            if standing == passage.id:
                yield passage
            else:
                self.aliases[passage.id] = standing


def _pieces(passage: Passage, embedder: MeasuringEmbedder) -> list[Passage]:
    """The passage, or parts that fit, of which the first keeps its id so that what cites it still finds it."""
    if _fits(passage, embedder):
        return [passage]
    meta = {**passage.meta, "parent": passage.id}
    return [
        replace(passage, id=f"{passage.id}#{number}" if number > 1 else passage.id, text=text, meta=meta)
        for number, text in enumerate(split(passage, embedder), start=1)
    ]


def normalised(passage: Passage) -> str:
    """Title and text as they are compared: without regard to case, width of characters, or white space."""
    title, text = (unicodedata.normalize("NFKC", part).casefold().split() for part in (passage.title, passage.text))
    return " ".join([*title, "\n", *text])


def split(passage: Passage, embedder: MeasuringEmbedder) -> list[str]:
    """The text in parts that the embedder reads whole: of whole sentences, and where not even one fits, of words.

    Raises:
        UserError: its title alone is too long.
    """
    if embedder.count_tokens([replace(passage, text="a")])[0] > embedder.max_tokens:
        raise UserError(f"the title of passage {passage.id!r} is longer than the model reads; shorten it")
    texts, packed = [], ""
    for sentence in sentences(passage.text):
        if packed and not _fits(replace(passage, text=packed + sentence), embedder):
            texts.append(packed)
            packed = ""
        packed += sentence
        while packed and not _fits(replace(passage, text=packed), embedder):
            end = _longest(packed, passage, embedder)
            texts.append(packed[:end])
            packed = packed[end:]
    return [text.strip() for text in [*texts, packed] if text.strip()]


def _longest(text: str, passage: Passage, embedder: MeasuringEmbedder) -> int:
    """How many characters fit, at least one; to the end of a word where there is one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if _fits(replace(passage, text=text[:middle]), embedder):
            low = middle
        else:
            high = middle - 1
    blank = text.rfind(" ", 1, low + 1)
    return blank if blank > 0 else low


def _fits(passage: Passage, embedder: MeasuringEmbedder) -> bool:
    return embedder.count_tokens([passage])[0] <= embedder.max_tokens


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
