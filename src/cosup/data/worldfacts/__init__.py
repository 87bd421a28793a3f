"""Worldfacts: a data set of real facts about countries and chemical elements, built without a network.

Each passage tells one side of one entity, so that finding the entity is not enough to find the passage. Questions are
slots to fill, plain questions, claims to judge, and questions of two hops; what is asked of a test entity was never
asked of it, nor of its passages, in training.

Sources: `countryinfo` (MIT) for capitals, currencies, languages, borders, areas, domains and calling codes;
`pycountry` (LGPL-2.1-only; Debian's iso-codes) for names of countries, currencies and languages; `periodictable`
(public domain) for the elements. They are read where they are installed; nothing of them is part of cosup.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from cosup.config import UserError
from cosup.data.records import Passage, Question, write_records
from cosup.data.worldfacts.countries import countries
from cosup.data.worldfacts.elements import elements
from cosup.data.worldfacts.facts import Entity
from cosup.data.worldfacts.questions import clear_clues, passages, questions, tellable
from cosup.files import atomic_folder

__all__ = ["Worldfacts", "WorldfactsSummary", "build_worldfacts", "worldfacts"]

TRAIN_SHARE, DEV_SHARE = 0.7, 0.1


@dataclass(frozen=True, slots=True)
class WorldfactsSummary:
    """How many of each there are."""

    entities: int
    passages: int
    train: int
    dev: int
    test: int


@dataclass(frozen=True, slots=True)
class Worldfacts:
    """The data set: passages of all entities, and questions split by entity."""

    passages: list[Passage]
    train: list[Question]
    dev: list[Question]
    test: list[Question]

    @property
    def summary(self) -> WorldfactsSummary:
        """How many of each there are; entities are told apart by title."""
        entities = {passage.title for passage in self.passages}
        return WorldfactsSummary(len(entities), len(self.passages), len(self.train), len(self.dev), len(self.test))


def build_worldfacts(out: Path, *, seed: int = 0) -> WorldfactsSummary:
    """Writes `passages.jsonl`, `train.jsonl`, `dev.jsonl` and `test.jsonl` into the folder `out`, whole or not at all.

    Args:
        out: a folder; one that exists is replaced.
        seed: as for `worldfacts`.

    Raises:
        UserError: a data package is missing, or `out` can't be written.
    """
    data = worldfacts(seed)
    with atomic_folder(out, marker="passages.jsonl") as folder:
        write_records(folder / "passages.jsonl", data.passages)
        write_records(folder / "train.jsonl", data.train)
        write_records(folder / "dev.jsonl", data.dev)
        write_records(folder / "test.jsonl", data.test)
    return data.summary


def worldfacts(seed: int = 0) -> Worldfacts:
    """The data set in memory.

    Args:
        seed: wordings, splits and orders follow from it; the facts don't change.

    Raises:
        UserError: a data package is missing.
    """
    entities = _entities()
    rng = Random(seed)
    corpus = passages(entities, rng)
    clear = clear_clues(entities)
    train, dev, test = (questions(split, clear, rng) for split in _splits(entities, rng))
    return Worldfacts(corpus, train, dev, test)


def _entities() -> list[Entity]:
    try:
        found = [*countries(), *elements()]
    except ImportError as e:
        raise UserError(
            f"worldfacts needs the package {e.name}, which is not installed: run pip install 'cosup[worldfacts]'"
        ) from None
    return [entity for entity in map(tellable, found) if entity]


def _splits(entities: Sequence[Entity], rng: Random) -> tuple[list[Entity], list[Entity], list[Entity]]:
    mixed = rng.sample(entities, len(entities))
    train = round(TRAIN_SHARE * len(mixed))
    dev = train + round(DEV_SHARE * len(mixed))
    return mixed[:train], mixed[train:dev], mixed[dev:]
