"""The shared suite: brute force in NumPy, a folder by FAISS, and Milvus Lite give the same answers."""

import numpy as np
import pytest
from test_index import DIM, FakeEmbedder, _passages, _vector

from cosup.config import UserError
from cosup.data import Passage
from cosup.index import Hit, HybridIndex, build_collection, build_index, open_index

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


class BruteForce:
    """The index that all others are compared with."""

    def __init__(self, passages):
        self.fingerprint, self.dim = "fake", DIM
        self._passages = {p.id: (p, v) for p, v in zip(passages, FakeEmbedder().embed_passages(passages), strict=True)}

    def __len__(self):
        return len(self._passages)

    def __iter__(self):
        return (passage for passage, _ in self._passages.values())

    def search(self, queries_QD, k, *, where=None):
        fitting = [
            (p.id, v) for p, v in self._passages.values() if all(p.meta.get(a) == b for a, b in (where or {}).items())
        ]
        scored = [[Hit(id, float(v @ query)) for id, v in fitting] for query in queries_QD]
        return [sorted(row, key=lambda hit: -hit.score)[:k] for row in scored]

    def get(self, ids):
        return [self._passages[id][0] for id in ids]

    def vectors(self, ids):
        return np.array([self._passages[id][1] for id in ids], np.float32).reshape(len(ids), DIM)

    def add(self, passages, vectors_PD):
        self._passages |= {p.id: (p, v) for p, v in zip(passages, vectors_PD, strict=True)}

    def remove(self, ids):
        return sum(self._passages.pop(id, None) is not None for id in dict.fromkeys(ids))


COUNT = 700  # more than one request of Milvus


@pytest.fixture(params=["brute force", "flat", "hnsw", "ivf-pq", "milvus"])
def index(request, tmp_path):
    passages = [*_passages(COUNT), Passage("ü/\"'\\", 'a "b" \\ ü\n', "", {"source": 'a"\\b', "l": [1, {"x": None}]})]
    if request.param == "brute force":
        yield BruteForce(passages)
    elif request.param == "milvus":
        pytest.importorskip("pymilvus")
        url = f"milvus://{tmp_path}/index.db"
        opened = build_collection(passages, FakeEmbedder(), url, kind="flat", shards=str(tmp_path / "shards"))
        yield opened
        opened.close()
    else:
        yield build_index(passages, FakeEmbedder(), tmp_path / "index", kind=request.param)


@pytest.fixture
def reference():
    passages = [*_passages(COUNT), Passage("ü/\"'\\", 'a "b" \\ ü\n', "", {"source": 'a"\\b', "l": [1, {"x": None}]})]
    return BruteForce(passages)


QUERIES = np.random.default_rng(0).standard_normal((20, DIM)).astype(np.float32)


def _scores(rows):
    return {(number, hit.id): hit.score for number, row in enumerate(rows) for hit in row}


def _in_both(found, expected):
    """The scores of what both found, as the one and as the other gave them."""
    one, other = _scores(found), _scores(expected)
    return [{key: scores[key] for key in one.keys() & other.keys()} for scores in (one, other)]


def _sorted(rows):
    return [sorted(row, key=lambda hit: -hit.score) for row in rows]


@pytest.fixture
def least(index):
    kind = getattr(index, "manifest", None)
    return 0.95 if kind is not None and kind.kind != "flat" else 1.0


@pytest.mark.parametrize("where", [None, {"source": "a"}, {"n": 5}, {"source": "b", "n": 7}, {"source": 'a"\\b'}])
def test_every_index_finds_what_brute_force_finds(index, reference, least, where):
    for k in (1, 10, 2000):
        found, expected = (one.search(QUERIES, k, where=where) for one in (index, reference))
        ours, theirs = _in_both(found, expected)
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        assert len(ours) >= least * len(_scores(expected))
        assert found == _sorted(found)


def test_words_find_what_is_far_from_the_query_in_every_index(index):
    hybrid, query_1D = HybridIndex(index), _vector("far from all of them")[None]

    def found(**options):
        return [hit.id for hit in hybrid.search(query_1D, 3, words=["title 512"], weight=3.0, **options)[0]]

    assert found()[0] == found(where={"source": "a"})[0] == "p512"
    assert "p512" not in found(where={"source": "b"})
    index.remove(["p512"])
    assert "p512" not in found()


def test_every_index_gives_back_what_it_was_given(index, reference):
    assert {p.id: p for p in index} == {p.id: p for p in reference}
    assert len(index) == len(reference)
    ids = ["p7", "ü/\"'\\", "p0", "p7"]
    assert index.get(ids) == reference.get(ids)
    np.testing.assert_allclose(index.vectors(ids), reference.vectors(ids), rtol=1e-6)
    assert index.get([]) == []
    for method in (index.get, index.vectors):
        with pytest.raises(KeyError, match="gone"):
            method(["p1", "gone"])


def test_every_index_is_changed_alike(index, reference, least):
    new = [Passage("p3", "other", "", {"source": "new"}), Passage("new", "fresh")]
    for one in (index, reference):
        one.add(new, FakeEmbedder().embed_passages(new))
        assert one.remove(["p5", "gone", "p5", "ü/\"'\\"]) == 2
        assert len(one) == COUNT
    assert index.get(["p3", "new"]) == new
    ours, theirs = _in_both(index.search(QUERIES, 10), reference.search(QUERIES, 10))
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert len(ours) >= least * 10 * len(QUERIES)
    found, expected = (_scores(one.search(QUERIES, 5, where={"source": "new"})) for one in (index, reference))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    with pytest.raises(KeyError):
        index.get(["p5"])


def test_every_index_takes_nothing_for_an_answer(index):
    assert index.search(np.zeros((0, DIM), np.float32), 3) == []
    assert index.search(np.zeros((2, DIM), np.float32), 0) == [[], []]
    assert index.search(QUERIES[:1], 3, where={"source": "nowhere"}) == [[]]
    assert index.remove([]) == 0


# Milvus alone


@pytest.fixture
def url(tmp_path):
    pytest.importorskip("pymilvus")
    return f"milvus://{tmp_path}/index.db"


def _build(passages, url, tmp_path, **options):
    return build_collection(passages, FakeEmbedder(), url, shards=str(tmp_path / "shards"), **options)


def test_a_collection_is_opened_again_by_its_address_and_replaced_by_a_build(url, tmp_path):
    _build(_passages(12), url, tmp_path).close()
    opened = open_index(url)
    assert (len(opened), opened.fingerprint, opened.dim) == (12, "fake", DIM)
    opened.close()
    replaced = _build(_passages(3), url, tmp_path)
    assert sorted(p.id for p in replaced) == ["p0", "p1", "p2"]
    assert not (tmp_path / "shards").exists()
    replaced.close()


def test_a_build_that_fails_leaves_the_collection_that_was_there(url, tmp_path):
    _build(_passages(12), url, tmp_path).close()
    with pytest.raises(UserError, match="Milvus holds 65,535"):
        _build([Passage("long", "x" * 70_000)], url, tmp_path)
    with pytest.raises(UserError, match="the corpus is empty"):
        _build([], url, tmp_path)
    opened = open_index(url)
    assert len(opened) == 12
    opened.close()


def test_duplicates_are_found_in_milvus_too(url, tmp_path):
    index = _build([*_passages(3), Passage("twin", "TEXT 1", "title 1")], url, tmp_path)
    assert len(index) == 3
    assert index.get(["twin"]) == [_passages(3)[1]]
    index.close()


def test_user_and_password_are_handed_on_and_shown_nowhere(monkeypatch):
    pymilvus = pytest.importorskip("pymilvus")
    asked = []

    class Client:
        def __init__(self, uri, token=""):
            asked.append((uri, token))

        def has_collection(self, name):
            return False

    monkeypatch.setattr(pymilvus, "MilvusClient", Client)
    with pytest.raises(UserError) as caught:
        open_index("milvus://root:p%40ss:word@host:19531/notes")
    assert asked == [("http://host:19531", "root:p@ss:word")]
    assert "at milvus://host:19531/notes" in str(caught.value)
    assert "ss:word" not in str(caught.value)


def test_what_milvus_can_not_do_is_said(url, tmp_path):
    with pytest.raises(UserError, match="there is no index at milvus:"):
        open_index(url)
    with pytest.raises(UserError, match="is no address of Milvus"):
        open_index("milvus://host:19530")
    with pytest.raises(UserError, match=r"'milvus://host:99999/c' is no address of Milvus \(Port out of range"):
        open_index("milvus://user:secret@host:99999/c")
    with pytest.raises(UserError, match="Milvus has no kind 'OPQ'"):
        _build(_passages(3), url, tmp_path, kind="OPQ")
    index = _build(_passages(3), url, tmp_path)
    with pytest.raises(UserError, match=r"Milvus filters by texts, numbers and booleans, and 'l' is \[1\]"):
        index.search(_vector("q")[None], 1, where={"l": [1]})
    index.close()
