import numpy as np
import pytest
from test_index import DIM, FakeEmbedder, _passages, _vector
from test_index_prepare import WordEmbedder

from cosup.config import UserError
from cosup.data import Passage
from cosup.index import Update, build_index, check_index, estimate_build, update_index


class Counting(FakeEmbedder):
    def __init__(self):
        self.seen = []

    def embed_passages(self, passages):
        self.seen += [p.id for p in passages]
        return super().embed_passages(passages)


@pytest.fixture
def index(tmp_path):
    return build_index(_passages(12), FakeEmbedder(), tmp_path / "index")


def test_an_update_embeds_only_what_is_new_or_reads_differently(index):
    corpus = _passages(12)
    del corpus[5]
    corpus[3] = Passage("p3", "edited", corpus[3].title, corpus[3].meta)
    corpus[4] = Passage("p4", corpus[4].text, corpus[4].title, {"source": "moved"})
    corpus.append(Passage("new", "fresh"))
    embedder = Counting()
    assert update_index(index, corpus, embedder) == Update(1, 1, 1, 1, 9)
    assert sorted(embedder.seen) == ["new", "p3"]
    assert {p.id: p for p in index} == {p.id: p for p in corpus}
    [hits] = index.search(_vector("edited")[None], 1)
    assert hits[0].id == "p3"
    [hits] = index.search(_vector("text 4")[None], 1, where={"source": "moved"})
    assert hits[0].score == pytest.approx(1, abs=1e-5)
    assert not (index.folder / "building").exists()


def test_an_update_equals_a_build_of_the_same_corpus(index, tmp_path):
    corpus = [*_passages(8), Passage("new", "fresh")]
    update_index(index, corpus, FakeEmbedder())
    index.compact()
    built = build_index(corpus, FakeEmbedder(), tmp_path / "built")
    query = _vector("q")[None]
    assert index.search(query, 20) == built.search(query, 20)


def test_an_update_without_changes_writes_nothing(index):
    before = index.manifest
    assert update_index(index, _passages(12), FakeEmbedder()) == Update(0, 0, 0, 0, 12)
    assert index.manifest == before


def test_an_empty_corpus_does_not_empty_the_index(index):
    with pytest.raises(UserError, match="the corpus is empty"):
        update_index(index, [], FakeEmbedder())
    assert len(index) == 12


def test_an_update_can_keep_what_the_corpus_does_not_name(index):
    done = update_index(index, [Passage("new", "fresh")], FakeEmbedder(), remove_others=False)
    assert (done.added, done.removed, len(index)) == (1, 0, 13)


def test_an_update_remembers_duplicates(index):
    passages = [*_passages(12), Passage("twin", "TEXT 3", "title 3")]
    update_index(index, passages, FakeEmbedder())
    assert index.get(["twin"]) == [_passages(12)[3]]
    assert len(index) == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "other"}, "its fingerprint is words, this one's is other"),
        ({"dim": 5}, "its vectors have 4 dimensions, this one's 5"),
        (
            {"fingerprint": "other", "layout": {"passage template": "{text}"}},
            "its passage template is '{title} {text}', this one's '{text}'",
        ),
        (
            {"fingerprint": "other", "layout": {"passage template": "{title} {text}", "similarity": "dot"}},
            "its similarity is 'cosine', this one's 'dot'",
        ),
    ],
)
def test_another_embedder_is_refused_with_what_differs(tmp_path, change, message):
    index = build_index(_passages(3), WordEmbedder(), tmp_path / "words")
    other = WordEmbedder()
    for name, value in change.items():
        setattr(other, name, value)
    with pytest.raises(UserError, match="the index was built by another model") as caught:
        update_index(index, _passages(3), other)
    assert message in str(caught.value)


def test_a_sound_index_passes_and_says_what_was_looked_at(index):
    found = check_index(index, FakeEmbedder(), sample=5)
    assert (found.files, found.sampled) == (5, 5)
    assert found.least_cosine == pytest.approx(1, abs=1e-5)


def test_a_vector_that_is_not_the_models_is_named(tmp_path):
    index = build_index(_passages(3), FakeEmbedder(), tmp_path / "index")
    index.add([Passage("p1", "text 1")], np.ones((1, DIM), np.float32))
    with pytest.raises(UserError, match="the vector of passage 'p1' has cosine"):
        check_index(index, FakeEmbedder())


def test_check_names_a_file_with_a_flipped_bit(index):
    path = index.folder / index.manifest.segments[0].files["vectors"].name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path} is damaged"):
        check_index(index)


def test_an_estimate_counts_and_writes_nothing(tmp_path):
    estimate = estimate_build(_passages(100), WordEmbedder(), tmp_path / "index", kind="auto")
    assert (estimate.passages, estimate.tokens, estimate.kind) == (100, 400, "flat")
    assert estimate.seconds > 0
    assert 0 < estimate.disk < estimate.free
    assert list(tmp_path.iterdir()) == []


def test_an_estimate_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="the corpus is empty"):
        estimate_build([], WordEmbedder(), tmp_path / "index")
