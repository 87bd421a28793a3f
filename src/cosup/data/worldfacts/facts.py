"""What a real fact is here, before it is put into words."""

import re
import unicodedata
from dataclasses import dataclass

Facts = dict[str, dict[str, "Fact"]]
"""Side of an entity -> field -> fact, such as `capital` -> `capital` -> Oslo."""

SIDES_AT_LEAST = 5

NUMBERS = tuple(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()  # noqa: SIM905
)


@dataclass(frozen=True, slots=True)
class Fact:
    """A value: as passages write it, and the answers that are accepted for it, the preferred one first."""

    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Entity:
    """Something that passages are about.

    Args:
        kind: `country` or `element`.
        title: its name as a title, such as "Netherlands" or "Iron".
        name: its name inside a sentence, such as "the Netherlands" or "iron".
        facts: what is known of it, by side.
    """

    kind: str
    title: str
    name: str
    facts: Facts

    @property
    def id(self) -> str:
        """Start of the ids of its passages."""
        return re.sub(r"[^a-z0-9]+", "-", plain(self.title).lower()).strip("-")


def fact(text: str, *aliases: str) -> Fact:
    """A fact whose answers are its text, the text without accents, and the aliases."""
    return Fact(text, tuple(dict.fromkeys((text, plain(text), *aliases))))


def words(text: str) -> frozenset[str]:
    """The words of a table written as one text."""
    return frozenset(text.split())


def plain(text: str) -> str:
    """`text` without accents."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def mentions(text: str, value: str) -> bool:
    """Whether `value` stands in `text` as words or a number of its own, not as a part of one."""
    return re.search(rf"(?<![\w.,+-]){re.escape(value)}(?![\w-]|[.,]\d)", text) is not None
