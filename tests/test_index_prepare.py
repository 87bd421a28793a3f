from collections.abc import Sequence

import numpy as np
import pytest

from cosup.config import UserError
from cosup.data import Passage
from cosup.index import MeasuringEmbedder, build_index
from cosup.index.prepare import Prepared, normalised


class WordEmbedder:
    """Counts words, title included, and reads at most eight."""

    fingerprint = "words"
    dim = 4
    max_tokens = 8
    layout = {"passage template": "{title} {text}", "similarity": "cosine"}  # noqa: RUF012

    def count_tokens(self, passages: Sequence[Passage]) -> list[int]:
        return [len(p.title.split()) + len(p.text.split()) for p in passages]

    def embed_passages(self, passages: Sequence[Passage]) -> np.ndarray:
        assert max(self.count_tokens(passages)) <= self.max_tokens
        return np.ones((len(passages), self.dim), np.float32)


def test_the_fake_can_measure() -> None:
    assert isinstance(WordEmbedder(), MeasuringEmbedder)


def test_a_long_passage_is_split_on_sentences_and_its_parts_name_it() -> None:
    long = Passage("p", "One two three. Four five six. Seven eight nine.", "T", {"source": "a"})
    prepared = Prepared([long], WordEmbedder())
    parts = list(prepared)
    assert [(p.id, p.text) for p in parts] == [
        ("p", "One two three. Four five six."),
        ("p#2", "Seven eight nine."),
    ]
    assert all(p.title == "T" and p.meta == {"source": "a", "parent": "p"} for p in parts)
    assert prepared.split == 1


def test_a_sentence_that_is_too_long_is_split_between_words_and_loses_none() -> None:
    text = " ".join(f"word{i}" for i in range(50))
    parts = list(Prepared([Passage("p", text)], WordEmbedder()))
    assert " ".join(p.text for p in parts) == text
    assert all(len(p.text.split()) <= 8 for p in parts)


def test_a_passage_that_fits_stays_as_it_is() -> None:
    passage = Passage("p", "One two.", "T", {"n": 1})
    assert list(Prepared([passage], WordEmbedder())) == [passage]


def test_a_title_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(UserError, match="the title of passage 'p' is longer than the model reads"):
        list(Prepared([Passage("p", "text", "a b c d e f g h i")], WordEmbedder()))


def test_an_embedder_that_can_not_measure_is_given_passages_as_they_are() -> None:
    class Plain:
        fingerprint, dim = "plain", 4

        def embed_passages(self, passages: Sequence[Passage]) -> np.ndarray:
            return np.ones((len(passages), 4), np.float32)

    long = Passage("p", "word " * 100)
    assert list(Prepared([long], Plain())) == [long]


@pytest.mark.parametrize("text", ["the  KRONE\n is money", "the krone is money", "ｔｈｅ krone is money"])  # noqa: RUF001
def test_passages_that_say_the_same_are_stored_once_and_found_under_both_ids(tmp_path, text) -> None:
    passages = [Passage("a", "The krone is money", "Norway"), Passage("b", text, "norway"), Passage("c", text, "Peru")]
    index = build_index(passages, WordEmbedder(), tmp_path / "index")
    assert [p.id for p in index] == ["a", "c"]
    assert index.get(["b", "a"]) == [passages[0], passages[0]]


def test_title_and_text_are_not_confused() -> None:
    assert normalised(Passage("p", "b c", "a")) != normalised(Passage("p", "c", "a b"))
