import json
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosup.config import UserError
from cosup.data import Passage
from cosup.index import BM25, FlatIndex, Hit, build_index
from cosup.index import build as building
from cosup.index.flat import Manifest

DIM = 8


class FakeEmbedder:
    """Unit vectors that depend on the text alone, so that each text is nearest to itself."""

    fingerprint = "fake"
    dim = DIM

    def embed_passages(self, passages: Sequence[Passage]) -> np.ndarray:
        return np.stack([_vector(passage.text) for passage in passages])


def _vector(text):
    vector = np.random.default_rng(zlib.crc32(text.encode())).standard_normal(DIM)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def _passages(count, start=0):
    return [Passage(f"p{i}", f"text {i}", f"title {i}", {"source": "ab"[i % 2], "n": i}) for i in range(start, count)]


@pytest.fixture
def index(tmp_path):
    return build_index(_passages(12), FakeEmbedder(), tmp_path / "index")


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    return build_index(_passages(12), FakeEmbedder(), tmp_path_factory.mktemp("unchanged") / "index")


@pytest.fixture
def folder(index):
    return index.folder


def _refused(folder):
    with pytest.raises(UserError) as caught:
        FlatIndex(folder)
    return str(caught.value)


def _ids(hits):
    return [[hit.id for hit in row] for row in hits]


# Search


@given(seed=st.integers(0, 10**6), count=st.integers(1, 12), k=st.integers(1, 15))
def test_search_is_brute_force_in_numpy(unchanged, seed, count, k):
    queries = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    vectors = FakeEmbedder().embed_passages(_passages(12))
    scores = queries @ vectors.T
    order = np.argsort(-scores, axis=1)[:, :k]
    hits = unchanged.search(queries, k)
    assert _ids(hits) == [[f"p{i}" for i in row] for row in order]
    found = [[hit.score for hit in row] for row in hits]
    np.testing.assert_allclose(found, np.take_along_axis(scores, order, 1), rtol=1e-5, atol=1e-5)


def test_more_than_there_are_gives_all_there_are(index):
    [row] = index.search(_vector("q")[None], 100)
    assert sorted(hit.id for hit in row) == sorted(f"p{i}" for i in range(12))
    assert [hit.score for hit in row] == sorted((hit.score for hit in row), reverse=True)


def test_no_queries_give_no_rows_and_no_k_empty_ones(index):
    assert index.search(np.zeros((0, DIM), np.float32), 3) == []
    assert index.search(np.zeros((2, DIM), np.float32), 0) == [[], []]


def test_queries_in_double_precision_find_the_same(index):
    query = _vector("text 5")[None]
    assert index.search(query.astype(np.float64), 1) == index.search(query, 1)
    assert isinstance(index.search(query, 1)[0][0], Hit)


@pytest.mark.parametrize("shape", [(DIM,), (1, DIM + 1)])
def test_queries_of_another_shape_are_refused(index, shape):
    with pytest.raises(ValueError, match=r"must have shape \[Q, 8\], not"):
        index.search(np.zeros(shape, np.float32), 1)


@pytest.mark.parametrize(
    ("where", "rows"),
    [({"source": "a"}, range(0, 12, 2)), ({"source": "b", "n": 3}, [3]), ({"source": "c"}, []), ({}, range(12))],
)
def test_a_search_can_be_restricted_by_meta(index, where, rows):
    [found] = index.search(_vector("q")[None], 12, where=where)
    [everything] = index.search(_vector("q")[None], 12)
    assert found == [hit for hit in everything if hit.id in {f"p{row}" for row in rows}]


# Passages


def test_passages_come_back_whole_and_in_order(index):
    assert list(index) == _passages(12)
    assert len(index) == 12
    assert index.get(["p7", "p0", "p7"]) == [_passages(12)[i] for i in (7, 0, 7)]
    assert index.get([]) == []


def test_an_id_that_is_not_there_is_a_key_error(index):
    with pytest.raises(KeyError, match="gone"):
        index.get(["p1", "gone"])


def test_passages_of_any_text_and_meta_come_back(tmp_path):
    passage = Passage("ü/\n", "\u2028 🏔\0", "", {"tags": ["a", {"b": None}], "url": "é"})
    build_index([passage], FakeEmbedder(), tmp_path / "index")
    assert FlatIndex(tmp_path / "index").get(["ü/\n"]) == [passage]


# Changes


def _new(*pairs):
    passages = [Passage(id, text) for id, text in pairs]
    return passages, FakeEmbedder().embed_passages(passages)


def test_what_is_added_is_found_at_once_and_after_opening_again(index):
    index.add(*_new(("new", "fresh")))
    for opened in (index, FlatIndex(index.folder)):
        assert len(opened) == 13
        assert _ids(opened.search(_vector("fresh")[None], 1)) == [["new"]]
        assert opened.get(["new", "p3"]) == [Passage("new", "fresh"), _passages(12)[3]]


def test_what_is_added_under_an_old_id_replaces_it(index):
    index.add(*_new(("p3", "other")))
    assert len(index) == 12
    assert index.get(["p3"]) == [Passage("p3", "other")]
    [row] = index.search(_vector("q")[None], 12)
    scores = {hit.id: hit.score for hit in row}
    assert scores["p3"] == pytest.approx(float(_vector("q") @ _vector("other")), rel=1e-5)
    assert scores["p4"] == pytest.approx(float(_vector("q") @ _vector("text 4")), rel=1e-5)


def test_what_is_removed_is_gone_and_the_others_are_found_as_before(index):
    before = [hit for hit in index.search(_vector("q")[None], 12)[0] if hit.id not in {"p0", "p5"}]
    assert index.remove(["p5", "p0", "gone", "p5"]) == 2
    for opened in (index, FlatIndex(index.folder)):
        assert [hit.id for hit in opened.search(_vector("q")[None], 12)[0]] == [hit.id for hit in before]
        with pytest.raises(KeyError):
            opened.get(["p5"])


def test_removing_what_is_not_there_writes_nothing(index):
    before = {path: path.stat().st_mtime_ns for path in index.folder.iterdir()}
    assert index.remove(["gone"]) == 0
    assert {path: path.stat().st_mtime_ns for path in index.folder.iterdir()} == before


def test_an_index_that_was_emptied_is_searched_opened_and_filled_again(index):
    assert index.remove([f"p{i}" for i in range(12)]) == 12
    opened = FlatIndex(index.folder)
    assert (len(opened), list(opened), opened.search(_vector("q")[None], 3)) == (0, [], [[]])
    opened.add(*_new(("new", "fresh")))
    assert _ids(FlatIndex(index.folder).search(_vector("q")[None], 3)) == [["new"]]


def test_a_reader_that_was_opened_before_a_change_keeps_its_state(index):
    reader = FlatIndex(index.folder)
    before = reader.search(_vector("q")[None], 12)
    index.add(*_new(("p3", "other"), ("new", "fresh")))
    index.remove(["p1"])
    assert reader.search(_vector("q")[None], 12) == before
    assert list(reader) == _passages(12)
    assert len(FlatIndex(index.folder)) == 12


def test_changes_leave_only_the_files_that_the_manifest_names(index):
    index.add(*_new(("new", "fresh")))
    index.remove(["p1"])
    named = {index.manifest.vectors.name, index.manifest.passages.name, "index.json"}
    assert {path.name for path in index.folder.iterdir()} == named


def test_a_change_that_fails_leaves_the_state_before(index, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("halfway")

    monkeypatch.setattr(Manifest, "model_dump_json", fail)
    with pytest.raises(RuntimeError, match="halfway"):
        index.add(*_new(("new", "fresh")))
    monkeypatch.undo()
    for opened in (index, FlatIndex(index.folder)):
        assert list(opened) == _passages(12)
    index.add(*_new(("new", "fresh")))
    FlatIndex(index.folder)  # checks every file


def test_an_id_stands_once_even_if_it_is_added_twice_at_once(index):
    index.add(*_new(("new", "one"), ("new", "two")))
    assert index.remove(["new"]) == 1
    assert len(index) == 12


def test_vectors_in_double_precision_are_kept_in_single_precision(index):
    passages, vectors = _new(("new", "fresh"))
    size = index.manifest.vectors.bytes
    index.add(passages, vectors.astype(np.float64))
    assert index.manifest.vectors.bytes == size + 4 * DIM


def test_vectors_of_another_shape_are_refused(index):
    with pytest.raises(ValueError, match=r"must have shape \[1, 8\], not \[2, 8\]"):
        index.add([Passage("new", "fresh")], np.zeros((2, DIM), np.float32))


# Damage


def test_a_folder_without_an_index_is_refused(tmp_path):
    assert f"there is no index at {tmp_path}" in _refused(tmp_path)


@pytest.mark.parametrize("part", ["vectors", "passages"])
def test_a_missing_or_truncated_file_is_named(index, part):
    path = index.folder / getattr(index.manifest, part).name
    data = path.read_bytes()
    path.unlink()
    assert f"{path} is missing" in _refused(index.folder)
    path.write_bytes(data[:-1])
    assert f"{path} is {len(data) - 1:,} bytes long where the manifest says {len(data):,}" in _refused(index.folder)


@pytest.mark.parametrize("part", ["vectors", "passages"])
def test_a_file_of_the_right_size_that_is_something_else_is_named(index, part):
    path = index.folder / getattr(index.manifest, part).name
    size = path.stat().st_size
    path.unlink()
    path.write_bytes(b"x" * size)
    assert f"{path} is damaged" in _refused(index.folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format_version": 1}', '{"format_version": "1"}', "\xff"])
def test_a_damaged_manifest_is_named(folder, text):
    (folder / "index.json").write_bytes(text.encode("latin1"))
    assert f"{folder / 'index.json'} is damaged" in _refused(folder)


def test_a_newer_format_is_refused_with_its_version(folder):
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99, "shards": []}))
    assert "has format version 99, newer than this cosup reads; upgrade" in _refused(folder)


@pytest.mark.parametrize("part", ["vectors", "passages"])
def test_opening_finds_a_single_flipped_bit_and_names_its_file(index, part):
    path = index.folder / getattr(index.manifest, part).name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path} is damaged: its checksum differs"):
        FlatIndex(index.folder)


@pytest.mark.parametrize("place", [-20, -300, 300], ids=["footer", "schema in the footer", "head of a batch"])
def test_a_passages_file_with_damaged_structure_is_named(index, place):
    path = index.folder / index.manifest.passages.name
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.unlink()
    path.write_bytes(data)
    assert f"{path} is damaged" in _refused(index.folder)


@pytest.mark.parametrize("change", [{"dim": 4}, {"count": 3}])
def test_a_manifest_that_contradicts_its_files_is_refused(folder, change):
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert "is damaged" in _refused(folder)


# Building


def test_a_manifest_says_what_the_folder_holds(index):
    raw = json.loads((index.folder / "index.json").read_text())
    assert (raw["format_version"], raw["fingerprint"], raw["dim"], raw["count"]) == (1, "fake", DIM, 12)
    assert (index.fingerprint, index.dim) == ("fake", DIM)


def test_a_corpus_of_several_shards_keeps_its_order_and_tells_its_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "_SHARD", 5)
    told = []
    index = build_index(iter(_passages(12)), FakeEmbedder(), tmp_path / "index", on_progress=told.append)
    assert told == [5, 10, 12]
    assert list(index) == _passages(12)
    monkeypatch.undo()
    whole = build_index(_passages(12), FakeEmbedder(), tmp_path / "whole")
    query = _vector("q")[None]
    assert index.search(query, 12) == whole.search(query, 12)


def test_an_empty_corpus_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="the corpus is empty"):
        build_index([], FakeEmbedder(), tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("place", ["embedding", "writing"])
def test_an_interrupted_build_leaves_what_was_there(tmp_path, monkeypatch, place, error):
    def fail(*args, **options):
        raise error

    target = FakeEmbedder if place == "embedding" else Manifest
    name = "embed_passages" if place == "embedding" else "model_dump_json"
    with monkeypatch.context() as patch:
        patch.setattr(target, name, fail)
        with pytest.raises(type(error)):
            build_index(_passages(3), FakeEmbedder(), tmp_path / "index")
        assert list(tmp_path.iterdir()) == []
    build_index(_passages(3), FakeEmbedder(), tmp_path / "index")
    with monkeypatch.context() as patch:
        patch.setattr(target, name, fail)
        with pytest.raises(type(error)):
            build_index(_passages(5), FakeEmbedder(), tmp_path / "index")
    assert list(FlatIndex(tmp_path / "index")) == _passages(3)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_build_replaces_the_index_that_was_there(tmp_path):
    build_index(_passages(3), FakeEmbedder(), tmp_path / "index").remove(["p0"])
    build_index(_passages(5), FakeEmbedder(), tmp_path / "index")
    assert list(FlatIndex(tmp_path / "index")) == _passages(5)
    assert len(list((tmp_path / "index").iterdir())) == 3


# BM25


def test_bm25_finds_the_obvious_passage(passages):
    bm25 = BM25(passages)
    found = bm25.search(["the currency of Norway", "the symbol of IRON", "atomic number"], 2)
    assert [set(row) for row in found] == [{"p1", "p7"}, {"p3", "p9"}, {"p4", "p10"}]


def test_bm25_reads_titles():
    assert BM25([Passage("a", "text", "Iron"), Passage("b", "text", "Gold")]).search(["gold"], 1) == [["b"]]


def test_bm25_of_no_queries_is_empty_and_more_than_match_gives_those_that_do(passages):
    assert BM25(passages).search([], 3) == []
    [row] = BM25(passages).search(["Norway"], 100)
    assert sorted(row) == ["p0", "p1", "p6", "p7"]


@pytest.mark.parametrize("texts", [[], ["the of and"]], ids=["no passages", "stop words alone"])
def test_bm25_of_nothing_to_match_finds_without_a_warning(texts):
    ids = [str(number) for number in range(len(texts))]
    bm25 = BM25([Passage(id, text) for id, text in zip(ids, texts, strict=True)])
    assert bm25.search(["Norway"], 3) == [[]]
