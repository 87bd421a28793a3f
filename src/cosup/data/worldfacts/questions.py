"""From facts to passages and questions of four kinds."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from cosup.data.records import Passage, QAPair, Question
from cosup.data.worldfacts.facts import SIDES_AT_LEAST, Entity, Fact, mentions, plain
from cosup.data.worldfacts.wording import CLUES, LINKS, PASSAGES, RELATIONS, Clue, Relation

CLAIM_SHARE = 0.57
"""Claims per fact that can be claimed."""

HOPS_PER_ENTITY = 2
"""Hops between two passages of one entity; as many again where a clue leads on to another entity."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One fact that can be asked: the field of a side of an entity."""

    entity: Entity
    side: str
    field: str

    @property
    def fact(self) -> Fact:
        """The fact itself."""
        return self.entity.facts[self.side][self.field]

    @property
    def relation(self) -> Relation:
        """How it is asked."""
        return RELATIONS[self.side, self.field]

    @property
    def passage(self) -> str:
        """Id of the passage that tells it."""
        return passage_id(self.entity, self.side)

    @property
    def id(self) -> str:
        """End of the ids of its questions."""
        return self.passage if self.side == self.field else f"{self.passage}-{self.field}"


def passage_id(entity: Entity, side: str) -> str:
    """Id of the passage about a side of an entity, such as `norway-capital`."""
    return f"{entity.id}-{side}"


def tellable(entity: Entity) -> Entity | None:
    """The entity with the sides that no title and no other side gives away, or None if too few are left."""
    facts = dict(entity.facts)
    for side in entity.facts:
        others = [entity.title, entity.name, *(f.text for s, fs in facts.items() if s != side for f in fs.values())]
        if any(mentions(plain(other), plain(f.text)) for other in others for f in facts[side].values()):
            del facts[side]
    return Entity(entity.kind, entity.title, entity.name, facts) if len(facts) >= SIDES_AT_LEAST else None


def passages(entities: Sequence[Entity], rng: Random) -> list[Passage]:
    """One passage for each side of each entity."""
    return [_passage(entity, side, rng) for entity in entities for side in entity.facts]


def _passage(entity: Entity, side: str, rng: Random) -> Passage:
    fields = {field: fact.text for field, fact in entity.facts[side].items()}
    text = _sentence(rng.choice(PASSAGES[side]), name=entity.name, **fields)
    return Passage(passage_id(entity, side), text, entity.title, {"tags": [entity.kind, side]})


def questions(entities: Sequence[Entity], clear: frozenset[tuple[Clue, str]], rng: Random) -> list[Question]:
    """The questions about some entities, in random order.

    Args:
        entities: one split; false claims and second hops stay inside it.
        clear: from `clear_clues`, over all splits.
        rng: chooses wordings, claims and hops.
    """
    asks = [Ask(e, side, field) for e in entities for side, fields in e.facts.items() for field in fields]
    asks = [ask for ask in asks if (ask.side, ask.field) in RELATIONS]
    found = [_slot(ask, rng) for ask in asks]
    found += [_plain(ask, rng) for ask in asks]
    found += _claims([ask for ask in asks if ask.relation.claims], rng)
    found += _hops(entities, clear, asks, rng)
    rng.shuffle(found)
    return found


def clear_clues(entities: Sequence[Entity]) -> frozenset[tuple[Clue, str]]:
    """The clues and values that only one of all the entities answers to and that don't give its name away."""
    uses = Counter((clue, entity.facts[clue.side][clue.field].text) for entity in entities for clue in _clues(entity))
    titles = {entity.title for entity in entities}
    return frozenset((clue, text) for (clue, text), n in uses.items() if n == 1 and not _names_any(text, titles))


def _names_any(text: str, titles: Iterable[str]) -> bool:
    return any(title in text for title in titles)


def _slot(ask: Ask, rng: Random) -> Question:
    text = f"{ask.entity.title} [SEP] {rng.choice(ask.relation.slots)}"
    return Question(f"slot-{ask.id}", "worldfacts-slot", text, list(ask.fact.answers), [ask.passage], _stated(ask))


def _plain(ask: Ask, rng: Random) -> Question:
    text = _sentence(rng.choice(ask.relation.questions), name=ask.entity.name)
    return Question(f"qa-{ask.id}", "worldfacts-qa", text, list(ask.fact.answers), [ask.passage], _stated(ask))


def _claims(asks: Sequence[Ask], rng: Random) -> list[Question]:
    """Claims about a random part of `asks`, every second one false."""
    chosen = rng.sample(asks, round(CLAIM_SHARE * len(asks)))
    return [_claim(ask, asks, truth=i % 2 == 0, rng=rng) for i, ask in enumerate(chosen)]


def _claim(ask: Ask, asks: Sequence[Ask], *, truth: bool, rng: Random) -> Question:
    value = ask.fact.text if truth else rng.choice(_other_values(ask, asks))
    text = _sentence(rng.choice(ask.relation.claims), name=ask.entity.name, value=value)
    label = "true" if truth else "false"
    verdict = [f"{ask.fact.text}, so {label}"]
    return Question(f"claim-{ask.id}", "worldfacts-claim", text, [label], [ask.passage], verdict, label=label)


def _stated(ask: Ask) -> list[str]:
    """The fact as a sentence, which says which value of its passage is meant; without a wording, the bare value."""
    if not ask.relation.claims:
        return [ask.fact.answers[0]]
    return [_sentence(ask.relation.claims[0], name=ask.entity.name, value=ask.fact.text)]


def _other_values(ask: Ask, asks: Sequence[Ask]) -> list[str]:
    texts = {other.fact.text for other in asks if (other.side, other.field) == (ask.side, ask.field)}
    return sorted(texts - {ask.fact.text})


def _hops(
    entities: Sequence[Entity], clear: frozenset[tuple[Clue, str]], asks: Sequence[Ask], rng: Random
) -> Iterator[Question]:
    by_name = {entity.name: entity for entity in entities}
    for entity in entities:
        clues = [clue for clue in _clues(entity) if (clue, entity.facts[clue.side][clue.field].text) in clear]
        link = LINKS[entity.kind]
        linked = by_name.get(entity.facts[link.side][link.field].text) if link.side in entity.facts else None
        within = [(clue, ask) for clue in clues for ask in asks if ask.entity is entity and ask.side != clue.side]
        onward = [(link, ask) for ask in asks if ask.entity is linked and ask.side != link.side]
        for ways in (within, onward):
            for clue, ask in rng.sample(ways, min(HOPS_PER_ENTITY, len(ways))):
                yield _hop(entity, clue, ask, rng)


def _hop(entity: Entity, clue: Clue, ask: Ask, rng: Random) -> Question:
    named = {"name": entity.name, "value": entity.facts[clue.side][clue.field].text}
    wording = rng.choice(ask.relation.questions)
    first = QAPair(clue.question.format(**named), [ask.entity.name.removeprefix("the ")])
    second = QAPair(_sentence(wording, name=ask.entity.name), list(ask.fact.answers))
    return Question(
        id=f"hop-{passage_id(entity, clue.side)}-{clue.field}-{ask.id}",
        task="worldfacts-hop",
        question=_sentence(wording, name=clue.phrase.format(**named)),
        answers=list(ask.fact.answers),
        gold=[passage_id(entity, clue.side), ask.passage],
        long_answers=_stated(ask),
        qa_pairs=[first, second],
    )


def _clues(entity: Entity) -> list[Clue]:
    return [clue for clue in CLUES[entity.kind] if clue.side in entity.facts]


def _sentence(template: str, **values: str) -> str:
    text = template.format(**values)
    return text[0].upper() + text[1:]
