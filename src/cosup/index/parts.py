"""What an index holds of a passage under other ids: parts of one that was too long, and duplicates that it stands for.

A passage that was split keeps its id for the first part; the others are `id#2`, `id#3` and so on, with it as `parent`.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import count

from cosup.data import Passage
from cosup.index.protocol import Index


def whole_of(passage: Passage) -> str:
    """The id of the passage that this is a part of; its own, where it is none."""
    parent = passage.meta.get("parent")
    return parent if isinstance(parent, str) and passage.id.startswith(f"{parent}#") else passage.id


def parts_of(index: Index, id: str) -> Iterator[str]:
    """The ids of the parts of a passage, but for the first, which has the passage's."""
    for number in count(2):
        part = f"{id}#{number}"
        try:
            (found,) = index.get([part])
        except KeyError:
            return
        if whole_of(found) != id:
            return
        yield part


def renamed(passage: Passage, old: str, new: str) -> Passage:
    """A passage, or a part of it, under another id."""
    meta = passage.meta | ({"parent": new} if passage.meta.get("parent") == old else {})
    return replace(passage, id=new + passage.id.removeprefix(old), meta=meta)


def settled(
    aliases: Mapping[str, str], *, lost: Collection[str], taken: Collection[str], new: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """What becomes of duplicates in a change: none loses its text because the passage that stood for it goes.

    Args:
        aliases: ids of duplicates, with the id of the passage that stands for each.
        lost: ids of passages whose text goes.
        taken: ids that are removed, or stand for themselves from now on.
        new: duplicates that come with the change.

    Returns:
        The duplicates afterwards, and, for each lost passage that had any, the id under which its text stays.
    """
    kept = {id: standing for id, standing in aliases.items() if id not in taken and id not in new}
    heirs: dict[str, str] = {}
    for id, standing in kept.items():
        if standing in lost:
            heirs.setdefault(standing, id)
    settled = {id: heirs.get(standing, standing) for id, standing in kept.items() if heirs.get(standing) != id}
    return settled | dict(new), heirs
