import json
import re
import shutil
import subprocess
import sys
import threading
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosup.config import UserError
from cosup.data import Passage
from cosup.index import BM25, FaissIndex, Hit, ann, build_index
from cosup.index import build as building
from cosup.index import folder as changing
from cosup.index import shards as sharding
from cosup.index.lookup import meta_keys
from cosup.index.manifest import check_fully

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
        FaissIndex(folder)
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
    assert FaissIndex(tmp_path / "index").get(["ü/\n"]) == [passage]


# Changes


def _new(*pairs):
    passages = [Passage(id, text) for id, text in pairs]
    return passages, FakeEmbedder().embed_passages(passages)


def test_what_is_added_is_found_at_once_and_after_opening_again(index):
    index.add(*_new(("new", "fresh")))
    for opened in (index, FaissIndex(index.folder)):
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
    for opened in (index, FaissIndex(index.folder)):
        assert [hit.id for hit in opened.search(_vector("q")[None], 12)[0]] == [hit.id for hit in before]
        with pytest.raises(KeyError):
            opened.get(["p5"])


def test_removing_what_is_not_there_writes_nothing(index):
    before = {path: path.stat().st_mtime_ns for path in index.folder.iterdir()}
    assert index.remove(["gone"]) == 0
    assert {path: path.stat().st_mtime_ns for path in index.folder.iterdir()} == before


def test_an_index_that_was_emptied_is_searched_opened_and_filled_again(index):
    assert index.remove([f"p{i}" for i in range(12)]) == 12
    opened = FaissIndex(index.folder)
    assert (len(opened), list(opened), opened.search(_vector("q")[None], 3)) == (0, [], [[]])
    opened.add(*_new(("new", "fresh")))
    assert _ids(FaissIndex(index.folder).search(_vector("q")[None], 3)) == [["new"]]


def test_a_reader_that_was_opened_before_a_change_keeps_its_state(index):
    reader = FaissIndex(index.folder)
    before = reader.search(_vector("q")[None], 12)
    index.add(*_new(("p3", "other"), ("new", "fresh")))
    index.remove(["p1"])
    assert reader.search(_vector("q")[None], 12) == before
    assert list(reader) == _passages(12)
    assert len(FaissIndex(index.folder)) == 12


def test_changes_leave_only_the_files_that_the_manifest_names(index):
    index.add(*_new(("new", "fresh")))
    index.remove(["p1"])
    named = {file.name for file in index.manifest.files()} | {"index.json", "history.jsonl", "lock"}
    assert {path.name for path in index.folder.iterdir()} == named


def test_a_change_that_fails_leaves_the_state_before(index, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("halfway")

    monkeypatch.setattr(changing, "write_manifest", fail)
    with pytest.raises(RuntimeError, match="halfway"):
        index.add(*_new(("new", "fresh")))
    monkeypatch.undo()
    for opened in (index, FaissIndex(index.folder)):
        assert list(opened) == _passages(12)
    index.add(*_new(("new", "fresh")))
    for file in FaissIndex(index.folder).manifest.files():
        check_fully(index.folder, file)


def test_an_id_stands_once_even_if_it_is_added_twice_at_once(index):
    index.add(*_new(("new", "one"), ("new", "two")))
    assert index.remove(["new"]) == 1
    assert len(index) == 12


def test_vectors_in_double_precision_are_kept_in_single_precision(index):
    passages, vectors = _new(("new", "fresh"))
    index.add(passages, vectors.astype(np.float64))
    stored = np.load(index.folder / index.manifest.segments[-1].files["vectors"].name)
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(index.vectors(["new"]), vectors)


def test_vectors_of_another_shape_are_refused(index):
    with pytest.raises(ValueError, match=r"must have shape \[1, 8\], not \[2, 8\]"):
        index.add([Passage("new", "fresh")], np.zeros((2, DIM), np.float32))


# Damage


def test_a_folder_without_an_index_is_refused(tmp_path):
    assert f"there is no index at {tmp_path}" in _refused(tmp_path)


PARTS = ["vectors", "passages", "places", "ids", "meta"]


def _path(index, part):
    return index.folder / index.manifest.segments[0].files[part].name


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_or_truncated_file_is_named(index, part):
    path = _path(index, part)
    data = path.read_bytes()
    path.unlink()
    assert f"{path} is missing" in _refused(index.folder)
    path.write_bytes(data[:-1])
    assert f"{path} is {len(data) - 1:,} bytes long where the manifest says {len(data):,}" in _refused(index.folder)


@pytest.mark.parametrize("part", PARTS)
def test_a_file_of_the_right_size_that_is_something_else_is_named(index, part):
    path = _path(index, part)
    size = path.stat().st_size
    path.unlink()
    path.write_bytes(b"x" * size)
    assert f"{path} is damaged" in _refused(index.folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format_version": 2}', '{"format_version": "1"}', "\xff"])
def test_a_damaged_manifest_is_named(folder, text):
    (folder / "index.json").write_bytes(text.encode("latin1"))
    assert f"{folder / 'index.json'} is damaged" in _refused(folder)


def test_a_manifest_that_can_not_be_read_is_named(folder):
    (folder / "index.json").unlink()
    (folder / "index.json").mkdir()
    assert f"{folder / 'index.json'} can't be read: Is a directory" in _refused(folder)


def test_a_newer_format_is_refused_with_its_version(folder):
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99, "shards": []}))
    assert "has format version 99, newer than this cosup reads; upgrade" in _refused(folder)


@pytest.mark.parametrize("part", PARTS)
def test_opening_finds_a_single_flipped_bit_and_names_its_file(index, part):
    path = _path(index, part)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path} is damaged: its checksum differs"):
        FaissIndex(index.folder)


@pytest.mark.parametrize("place", [-20, -300, 300], ids=["footer", "schema in the footer", "head of a batch"])
def test_a_passages_file_with_damaged_structure_is_named(index, place):
    path = _path(index, "passages")
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.unlink()
    path.write_bytes(data)
    assert f"{path} is damaged" in _refused(index.folder)


@pytest.mark.parametrize("change", [{"dim": 4}, {"count": 3}, {"fingerprint": "other"}])
def test_a_manifest_that_was_edited_is_refused(folder, change):
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert f"{path} is damaged (its checksum differs)" in _refused(folder)


def test_an_older_format_is_refused_with_what_to_do(folder):
    (folder / "index.json").write_text('{"format_version": 1, "kind": "flat"}')
    assert "format version 1, which this cosup no longer reads; build the index again" in _refused(folder)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Passages of more than 1 MiB, of which opening reads only samples."""
    passages = [Passage(f"p{i}", f"text {i} " + "x" * 2000, "", {"n": i}) for i in range(3000)]
    return build_index(passages, FakeEmbedder(), tmp_path_factory.mktemp("large") / "index", kind="hnsw")


def _damage(path, places):
    data = bytearray(path.read_bytes())
    for place in places:
        data[place] ^= 0xFF
    path.unlink()  # what is mapped stays as it is
    path.write_bytes(data)


def test_damage_between_the_samples_of_a_large_file_is_an_error_when_it_is_read_and_no_crash(large, tmp_path):
    folder = tmp_path / "index"
    shutil.copytree(large.folder, folder)
    path = folder / large.manifest.segments[0].files["passages"].name
    size = path.stat().st_size
    assert size > 5 << 20
    _damage(path, range(200_000, size - 200_000, 50))
    check = large.manifest.segments[0].files["passages"]
    try:
        opened = FaissIndex(folder)
    except UserError as e:  # a sampled block was hit
        assert str(path) in str(e)  # noqa: PT017
        return
    with pytest.raises(UserError, match="is damaged"):
        list(opened)
    with pytest.raises(UserError, match="is damaged"):
        check_fully(folder, check)


def test_damage_in_one_batch_of_passages_is_found_when_it_is_read_and_the_others_stay_readable(large, tmp_path):
    folder = tmp_path / "index"
    shutil.copytree(large.folder, folder)
    path = folder / large.manifest.segments[0].files["passages"].name
    size = path.stat().st_size
    _damage(path, [(size - (1 << 16)) * 3 // 30])  # halfway between two sampled blocks
    opened = FaissIndex(folder)
    assert opened.get(["p2999"])[0].id == "p2999"
    with pytest.raises(UserError, match=re.escape(f"{path} is damaged")):
        list(opened)


class WideEmbedder(FakeEmbedder):
    """So wide that few vectors fill a file of which opening reads only samples."""

    dim = 4096

    def embed_passages(self, passages: Sequence[Passage]) -> np.ndarray:
        return np.tile(super().embed_passages(passages), self.dim // DIM)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_changed_byte_anywhere_in_the_vectors_is_found_on_opening(dtype, tmp_path):
    index = build_index(_passages(500), WideEmbedder(), tmp_path / "index", dtype=dtype)
    path = _path(index, "vectors")
    size = path.stat().st_size
    assert size > 16 << 16
    _damage(path, [(size - (1 << 16)) * 3 // 30 + (1 << 15)])  # halfway between two sampled blocks
    assert f"{path} is damaged" in _refused(index.folder)


@pytest.mark.parametrize("part", ["faiss", "ids", "meta"])
def test_damage_in_what_is_searched_by_is_found_before_it_is_used(large, tmp_path, part):
    index = build_index(large, FakeEmbedder(), tmp_path / "index", kind="hnsw")
    _damage(_path(index, part), range(300, _path(index, part).stat().st_size, 997))
    entry = index.manifest.segments[0].files[part]
    with pytest.raises(UserError, match="is damaged"):
        check_fully(index.folder, entry)
    mapped = changing.MappedFile(index.folder, entry)
    with pytest.raises(UserError, match="is damaged"):
        mapped.verify()


# Building


def test_a_manifest_says_what_the_folder_holds(index):
    raw = json.loads((index.folder / "index.json").read_text())
    assert (raw["format_version"], raw["fingerprint"], raw["dim"], raw["count"]) == (2, "fake", DIM, 12)
    assert (index.fingerprint, index.dim) == ("fake", DIM)


def test_a_corpus_of_several_shards_keeps_its_order_and_tells_its_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "SHARD", 5)
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
def test_an_interrupted_build_leaves_the_index_that_was_there(tmp_path, monkeypatch, place, error):
    def fail(*args, **options):
        raise error

    build_index(_passages(3), FakeEmbedder(), tmp_path / "index")
    with monkeypatch.context() as patch:
        if place == "embedding":
            patch.setattr(FakeEmbedder, "embed_passages", fail)
        else:
            patch.setattr(building, "publish", fail)
        with pytest.raises(type(error)):
            build_index(_passages(5), FakeEmbedder(), tmp_path / "index")
    assert list(FaissIndex(tmp_path / "index")) == _passages(3)
    assert list(build_index(_passages(5), FakeEmbedder(), tmp_path / "index")) == _passages(5)


def test_a_build_that_was_interrupted_embeds_only_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "SHARD", 5)
    embedded = []

    class Failing(FakeEmbedder):
        def embed_passages(self, passages):
            if len(embedded) == 2:
                raise RuntimeError("halfway")
            embedded.append([p.id for p in passages])
            return super().embed_passages(passages)

    with pytest.raises(RuntimeError, match="halfway"):
        build_index(_passages(12), Failing(), tmp_path / "index")
    assert "the build is not finished: run it again" in _refused(tmp_path / "index")
    rest = []

    class Counting(FakeEmbedder):
        def embed_passages(self, passages):
            rest.extend(p.id for p in passages)
            return super().embed_passages(passages)

    index = build_index(_passages(12), Counting(), tmp_path / "index")
    assert rest == ["p10", "p11"]
    assert list(index) == _passages(12)
    assert not (tmp_path / "index" / "building").exists()


def test_a_build_that_goes_on_after_an_edit_or_with_another_model_embeds_what_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "SHARD", 5)
    with monkeypatch.context() as patch:
        patch.setattr(building, "publish", lambda *args: (_ for _ in ()).throw(RuntimeError("late")))
        with pytest.raises(RuntimeError, match="late"):
            build_index(_passages(12), FakeEmbedder(), tmp_path / "index")
    seen = []

    class Counting(FakeEmbedder):
        def embed_passages(self, passages):
            seen.extend(p.id for p in passages)
            return super().embed_passages(passages)

    edited = [*_passages(12)[:7], Passage("p7", "edited"), *_passages(12)[8:]]
    with monkeypatch.context() as patch:
        patch.setattr(building, "publish", lambda *args: (_ for _ in ()).throw(RuntimeError("late")))
        with pytest.raises(RuntimeError, match="late"):
            build_index(edited, Counting(), tmp_path / "index")
    assert seen == ["p5", "p6", "p7", "p8", "p9"]
    other = Counting()
    other.fingerprint = "other"
    build_index(edited, other, tmp_path / "index")
    assert len(seen) == 5 + 12


def test_a_build_replaces_the_index_that_was_there(tmp_path):
    build_index(_passages(3), FakeEmbedder(), tmp_path / "index").remove(["p0"])
    build_index(_passages(5), FakeEmbedder(), tmp_path / "index")
    assert list(FaissIndex(tmp_path / "index")) == _passages(5)
    assert len(list((tmp_path / "index").iterdir())) == len(PARTS) + 3


@pytest.mark.parametrize("manifest", ['{"format_version": 1}', "{"], ids=["older", "damaged"])
def test_a_build_replaces_an_index_that_can_no_longer_be_read(index, manifest):
    (index.folder / "index.json").write_text(manifest)
    assert list(build_index(_passages(3), FakeEmbedder(), index.folder)) == _passages(3)


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not ours to replace"):
        build_index(_passages(3), FakeEmbedder(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_passages_with_one_id_are_refused(tmp_path):
    with pytest.raises(UserError, match="two passages have the id 'p1'"):
        build_index([*_passages(3), Passage("p1", "other")], FakeEmbedder(), tmp_path / "index")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_embedded(tmp_path):
    with pytest.raises(UserError, match=r"GB of disk at .* are free; make room, or store vectors as float16 or int8"):
        build_index(_passages(3), FakeEmbedder(), tmp_path / "index", total=10**13)
    assert list(tmp_path.iterdir()) == []


def test_a_vector_that_is_not_finite_is_refused_with_its_passage(tmp_path):
    class Broken(FakeEmbedder):
        def embed_passages(self, passages):
            vectors = super().embed_passages(passages)
            vectors[1] = np.nan
            return vectors

    with pytest.raises(UserError, match="the vector of passage 'p1' is not finite"):
        build_index(_passages(3), Broken(), tmp_path / "index")


@pytest.mark.parametrize(("dtype", "error"), [("float16", 1e-3), ("int8", 1e-2)])
def test_vectors_stored_in_less_are_nearly_the_same_and_score_alike(tmp_path, dtype, error):
    index = build_index(_passages(300), FakeEmbedder(), tmp_path / "index", dtype=dtype)
    exact = FakeEmbedder().embed_passages(_passages(300))
    np.testing.assert_allclose(index.vectors([f"p{i}" for i in range(300)]), exact, atol=error)
    (hits,) = index.search(_vector("text 7")[None], 1)
    assert hits[0].id == "p7"
    index.add(*_new(("new", "fresh")))
    before = index.search(_vector("q")[None], 20)
    index.compact()
    assert index.search(_vector("q")[None], 20) == before  # as stored, not encoded anew


# Approximate search


@pytest.mark.parametrize("kind", ["hnsw", "ivf-pq", "SQ8", "PCA4,Flat", "OPQ4,IVF16,PQ4"])
def test_an_approximate_index_finds_most_of_the_nearest_with_exact_scores(tmp_path, kind):
    passages = _passages(3000)
    index = build_index(passages, FakeEmbedder(), tmp_path / "index", kind=kind)
    queries = np.random.default_rng(0).standard_normal((50, DIM)).astype(np.float32)
    vectors = FakeEmbedder().embed_passages(passages)
    exact = [{f"p{i}" for i in row} for row in np.argsort(-queries @ vectors.T, axis=1)[:, :10]]
    found = index.search(queries, 10)
    recall = np.mean([len({hit.id for hit in row} & best) / 10 for row, best in zip(found, exact, strict=True)])
    assert recall >= (0.5 if kind == "PCA4,Flat" else 0.95)
    for query, row in zip(queries, found, strict=True):
        assert [hit.score for hit in row] == sorted((hit.score for hit in row), reverse=True)
        np.testing.assert_allclose([h.score for h in row], [vectors[int(h.id[1:])] @ query for h in row], rtol=1e-5)


class CrowdedEmbedder:
    """Vectors in three crowds, within which all are about equally near to each other."""

    fingerprint, dim = "crowded", 64

    def embed_passages(self, passages):
        rows = [int(passage.id) for passage in passages]
        noise = np.stack([np.random.default_rng(row).standard_normal(self.dim) for row in rows]) / 16
        return (np.eye(3, self.dim)[np.array(rows) % 3] + noise).astype(np.float32)


def test_among_vectors_equally_near_more_candidates_are_scored_again(tmp_path, caplog, monkeypatch):
    corpus = [Passage(str(i), f"text {i}") for i in range(3000)]
    index = build_index(corpus, CrowdedEmbedder(), tmp_path / "index", kind="IVF4,PQ8x4")
    (entry,) = index.manifest.segments
    assert entry.candidates > 160
    assert entry.recall >= 0.95
    assert "of the ten nearest" not in caplog.text
    monkeypatch.setattr(ann, "_CANDIDATES", (160,))
    index = build_index(corpus, CrowdedEmbedder(), tmp_path / "index", kind="IVF4,PQ8x4")
    assert index.manifest.segments[0].recall < 0.95
    assert "kind IVF4,PQ8x4 finds" in caplog.text


@pytest.mark.parametrize("kind", ["hnsw", "ivf-pq", "SQ8"])
@pytest.mark.parametrize("where", [{"source": "a"}, {"n": 5}, {"source": "c"}])
def test_an_approximate_index_can_be_restricted_and_changed(tmp_path, kind, where):
    index = build_index(_passages(3000), FakeEmbedder(), tmp_path / "index", kind=kind)
    query = _vector("q")[None]
    exact = build_index(_passages(3000), FakeEmbedder(), tmp_path / "flat", kind="flat")
    wanted = {hit.id for hit in exact.search(query, 10, where=where)[0]}
    found = {hit.id for hit in index.search(query, 10, where=where)[0]}
    assert len(found & wanted) >= 0.9 * len(wanted)
    assert len(found) == len(wanted)
    best = index.search(query, 3)[0]
    index.remove([best[0].id])
    assert best[0].id not in {hit.id for hit in index.search(query, 10)[0]}
    assert index.search(query, 1)[0][0].id == best[1].id


def test_auto_is_exact_for_a_small_corpus_and_says_so(tmp_path, caplog):
    caplog.set_level("INFO", "cosup.index")
    assert build_index(_passages(3), FakeEmbedder(), tmp_path / "index").manifest.kind == "flat"
    assert "kind auto: flat (exact search) for 3 passages" in caplog.text


def test_auto_is_approximate_for_a_large_one(tmp_path, monkeypatch):
    monkeypatch.setattr("cosup.index.ann.AUTO_FLAT", 1000)
    assert build_index(_passages(1500), FakeEmbedder(), tmp_path / "index").manifest.kind == "ivf-pq"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nonsense", r"FAISS knows no kind 'nonsense' for vectors of \d+ \(could not parse index string nonsense\)"),
        ("ivf-pq", "trained on at least 256 passages"),
    ],
)
def test_a_kind_that_can_not_be_built_is_refused(tmp_path, kind, message):
    with pytest.raises(UserError, match=message):
        build_index(_passages(12), FakeEmbedder(), tmp_path / "index", kind=kind)


# Changes by several


def test_two_writers_at_once_are_one_clear_error(index):
    with changing.writing(index.folder):
        with pytest.raises(UserError, match=f"another process is writing to {index.folder}"):
            index.add(*_new(("new", "fresh")))
        with pytest.raises(UserError, match="another process is writing"):
            build_index(_passages(3), FakeEmbedder(), index.folder)
    assert list(FaissIndex(index.folder)) == _passages(12)


def test_a_writer_that_was_opened_before_another_wrote_adds_to_what_is_there_now(index):
    other = FaissIndex(index.folder)
    index.add(*_new(("one", "first")))
    other.add(*_new(("two", "second")))
    assert {"one", "two"} <= {passage.id for passage in FaissIndex(index.folder)}


def test_readers_see_whole_states_while_a_writer_changes_the_index(index):
    """Each state holds `count` copies of the same n in meta: a mixture would show two."""
    build_index([Passage(f"p{i}", f"text {i}", "", {"state": 0}) for i in range(5)], FakeEmbedder(), index.folder)
    stop, seen, errors = threading.Event(), set(), []

    def read():
        while not stop.is_set():
            try:
                states = {passage.meta["state"] for passage in FaissIndex(index.folder)}
            except Exception as e:
                errors.append(e)
                return
            seen.add(frozenset(states))

    reader = threading.Thread(target=read)
    reader.start()
    writer = FaissIndex(index.folder)
    for state in range(1, 30):
        passages = [Passage(f"p{i}", f"text {i}", "", {"state": state}) for i in range(5)]
        writer.add(passages, FakeEmbedder().embed_passages(passages))
        if state % 10 == 0:
            writer.compact()
    stop.set()
    reader.join()
    assert not errors
    assert seen
    assert all(len(states) == 1 for states in seen)


def test_compacting_keeps_every_answer_and_drops_what_was_removed(index):
    index.add(*_new(("p3", "other"), ("new", "fresh")))
    index.remove(["p5"])
    before, passages = index.search(_vector("q")[None], 20), list(index)
    index.compact()
    for opened in (index, FaissIndex(index.folder)):
        assert opened.search(_vector("q")[None], 20) == before
        assert list(opened) == passages
        assert len(opened.manifest.segments) == 1
        assert opened.manifest.removed is None


def test_a_killed_change_leaves_files_that_the_next_one_removes(index):
    (index.folder / "vectors-7.npy").write_bytes(b"half")
    (index.folder / ".passages-7.arrow.abc").write_bytes(b"half")
    assert list(FaissIndex(index.folder)) == _passages(12)
    index.remove(["p0"])
    assert not {"vectors-7.npy", ".passages-7.arrow.abc"} & {path.name for path in index.folder.iterdir()}


def test_history_says_what_happened_and_of_what(tmp_path):
    index = build_index(_passages(12), FakeEmbedder(), tmp_path / "index", origin="handbook.jsonl")
    index.add(*_new(("new", "fresh"), ("p1", "other")))
    built, changed = index.history()
    assert (built["what"], built["passages"], built["origin"]) == ("built", 12, "handbook.jsonl")
    assert (changed["added"], changed["replaced"], changed["removed"]) == (1, 1, 0)


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [(1, 1.0, True), (1, True, False), ("1", 1, False), ([1, {"a": 2, "b": 3}], [1.0, {"b": 3, "a": 2}], True)],
)
def test_values_of_meta_are_equal_as_json(one, other, equal):
    assert (meta_keys({"k": one}) == meta_keys({"k": other})) == equal


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


def test_bm25_starts_no_jax() -> None:
    code = (
        "import sys, types; sys.modules['jax'] = types.ModuleType('jax'); import cosup.index; print(sys.modules['jax'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "<module 'jax'>\n"  # bm25s would have asked it for jax.lax, and failed
