"""Passages that were split and duplicates: nothing of what goes stays behind, and nothing goes that should stay."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_index_prepare import WordEmbedder

from cosup.config import UserError
from cosup.data import Evidence, Example, Passage
from cosup.index import Index, Rules, build_collection, build_index, mine, open_index, update_index
from cosup.index import folder as changing

LONG = Passage("long", "One two three. Four five six. Seven eight nine. Ten is last.", "T", {"source": "a"})
PLAIN = Passage("plain", "Short.")
STANDING, TWIN, THIRD = (Passage(id, "The krone is money.", "Norway") for id in ("a", "b", "c"))
LONG_TWIN = Passage("other", LONG.text, LONG.title)


@pytest.fixture(params=["faiss", "milvus"])
def build(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def build(*passages: Passage) -> Any:
        if request.param == "faiss":
            return build_index(passages, WordEmbedder(), tmp_path / "index")
        pytest.importorskip("pymilvus")
        url = f"milvus://{tmp_path}/index.db"
        made.append(build_collection(passages, WordEmbedder(), url, shards=str(tmp_path / "shards")))
        return made[-1]

    yield build
    for index in made:
        index.close()


def vectors(*passages: Passage) -> np.ndarray:
    return np.ones((len(passages), WordEmbedder.dim), np.float32)


def ids(index: Index) -> set[str]:
    found = index.search(vectors(PLAIN), 100)[0]
    assert {passage.id for passage in index} == {hit.id for hit in found}
    return {hit.id for hit in found}


def test_removing_a_passage_removes_its_parts(build: Callable[..., Any]) -> None:
    index = build(LONG, PLAIN)
    assert ids(index) == {"long", "long#2", "plain"}
    assert index.remove(["long"]) == 2
    assert ids(index) == {"plain"}


def test_replacing_a_passage_removes_its_old_parts(build: Callable[..., Any]) -> None:
    index = build(LONG, PLAIN)
    index.add([Passage("long", "Short now.")], vectors(LONG))
    assert ids(index) == {"long", "plain"}
    assert index.get(["long"])[0].text == "Short now."


def test_a_passage_whose_id_only_looks_like_a_part_stays(build: Callable[..., Any]) -> None:
    index = build(PLAIN, Passage("plain#2", "Another."))
    assert index.remove(["plain"]) == 1
    assert ids(index) == {"plain#2"}


def test_a_duplicate_stays_when_the_passage_that_stands_for_it_is_removed(build: Callable[..., Any]) -> None:
    index = build(STANDING, TWIN, THIRD, PLAIN)
    assert ids(index) == {"a", "plain"}
    assert index.remove(["a"]) == 1
    assert ids(index) == {"b", "plain"}
    assert index.get(["b", "c"]) == [TWIN, TWIN]
    with pytest.raises(KeyError):
        index.get(["a"])
    assert index.remove(["b", "c"]) == 2
    assert ids(index) == {"plain"}


def test_a_duplicate_keeps_its_text_when_the_passage_that_stands_for_it_is_replaced(build: Callable[..., Any]) -> None:
    index = build(STANDING, TWIN)
    index.add([Passage("a", "The krona is money.", "Iceland")], vectors(STANDING))
    assert ids(index) == {"a", "b"}
    assert index.get(["b"]) == [TWIN]


def test_a_duplicate_that_is_replaced_stands_for_itself(build: Callable[..., Any]) -> None:
    index = build(STANDING, TWIN)
    index.add([Passage("b", "Another text.")], vectors(TWIN))
    assert ids(index) == {"a", "b"}
    assert index.get(["b"])[0].text == "Another text."
    assert index.remove(["a"]) == 1
    assert ids(index) == {"b"}


def test_a_duplicate_of_a_split_passage_stays_with_all_parts(build: Callable[..., Any]) -> None:
    index = build(LONG, LONG_TWIN)
    assert index.remove(["long"]) == 2
    assert ids(index) == {"other", "other#2"}
    assert " ".join(p.text for p in index.get(["other", "other#2"])) == LONG.text
    assert [p.meta["parent"] for p in index.get(["other", "other#2"])] == ["other", "other"]
    assert index.remove(["other"]) == 2
    assert len(index) == 0


def test_changed_duplicates_are_known_when_the_index_is_opened_again(tmp_path: Path) -> None:
    build_index([STANDING, TWIN, THIRD, PLAIN], WordEmbedder(), tmp_path / "index").remove(["a"])
    assert open_index(tmp_path / "index").get(["b", "c"]) == [TWIN, TWIN]


def test_an_update_that_keeps_others_replaces_parts_and_remembers_duplicates(tmp_path: Path) -> None:
    index = build_index([LONG, PLAIN, STANDING, TWIN], WordEmbedder(), tmp_path / "index")
    new = [Passage("long", "Short now."), Passage("x", "Fresh."), Passage("y", "FRESH.")]
    done = update_index(index, new, WordEmbedder(), remove_others=False)
    assert (done.added, done.changed, done.removed) == (1, 1, 1)
    assert ids(index) == {"long", "plain", "a", "x"}
    assert index.get(["y", "b"]) == [new[1], STANDING]


def test_an_update_forgets_the_duplicates_that_the_corpus_no_longer_names(tmp_path: Path) -> None:
    index = build_index([PLAIN, STANDING, TWIN, THIRD], WordEmbedder(), tmp_path / "index")
    update_index(index, [PLAIN, STANDING, TWIN], WordEmbedder())
    assert index.get(["b"]) == [STANDING]
    with pytest.raises(KeyError):
        index.get(["c"])
    update_index(index, [PLAIN, TWIN], WordEmbedder())
    assert ids(index) == {"plain", "b"}


def test_an_unchanged_part_stays_when_another_part_changes(tmp_path: Path) -> None:
    index = build_index([LONG], WordEmbedder(), tmp_path / "index")
    edited = Passage("long", LONG.text.replace("One", "Uno"), LONG.title, LONG.meta)
    done = update_index(index, [edited], WordEmbedder())
    assert (done.changed, done.unchanged, done.removed) == (1, 1, 0)
    assert ids(index) == {"long", "long#2"}


def test_no_other_writer_gets_in_while_an_update_embeds(tmp_path: Path) -> None:
    index = build_index([PLAIN], WordEmbedder(), tmp_path / "index")

    class Intruder(WordEmbedder):
        def embed_passages(self, passages: Any) -> np.ndarray:
            with pytest.raises(UserError, match="another process is writing"):
                open_index(tmp_path / "index").remove(["plain"])
            with pytest.raises(UserError, match="another process is writing"), changing.writing(index.folder):
                pass
            return super().embed_passages(passages)

    assert update_index(index, [PLAIN, STANDING], Intruder()).added == 1


def test_parts_of_golds_are_no_negatives_and_negatives_are_whole(tmp_path: Path) -> None:
    gold, other = LONG, Passage("second", LONG.text.replace("One", "Uno"), "U")
    index = build_index([gold, other, PLAIN], WordEmbedder(), tmp_path / "index")
    assert len(index) == 5
    example = Example("e", "squad", "?", (Evidence("long", "c"),))
    (mined,) = mine([example], index, lambda group: [vectors(PLAIN)] * len(group), rules=Rules(9, margin=None))
    assert set(mined.evidence[0].negatives) == {"second", "plain"}
