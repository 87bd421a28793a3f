import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cosup.config import UserError
from cosup.data import Passage, write_records
from cosup.index import Source


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def test_jsonl_is_read_and_counted(tmp_path):
    passages = [Passage("a", "one"), Passage("b", "two", "T", {"n": 1})]
    for name in ("p.jsonl", "q.jsonl.gz"):
        write_records(tmp_path / name, passages)
        source = Source([tmp_path / name])
        assert list(source) == list(source) == passages
        assert source.count() == 2


def test_parquet_is_read_with_its_other_columns_as_meta(tmp_path):
    path = parquet(
        tmp_path / "p.parquet",
        id=["a", "b"],
        text=["one", "two"],
        title=["T", None],
        meta=[json.dumps({"n": 1}), ""],
        url=["u", None],
    )
    source = Source([path])
    assert list(source) == [Passage("a", "one", "T", {"n": 1, "url": "u"}), Passage("b", "two")]
    assert source.count() == 2


def test_a_folder_of_parquet_without_ids_numbers_its_rows(tmp_path):
    (tmp_path / "data").mkdir()
    parquet(tmp_path / "data" / "a.parquet", text=["one"])
    parquet(tmp_path / "data" / "b.parquet", text=["two", "three"])
    source = Source([tmp_path / "data"])
    assert [(p.id, p.text) for p in source] == [("a-0", "one"), ("b-0", "two"), ("b-1", "three")]
    assert source.count() == 3


def test_a_struct_is_meta_and_a_date_is_text(tmp_path):
    import datetime

    path = parquet(tmp_path / "p.parquet", text=["one"], meta=[{"n": 1}], day=[datetime.date(2026, 1, 2)])
    assert next(iter(Source([path]))).meta == {"n": 1, "day": "2026-01-02"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_a_data_set_is_read_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"id": 7, "text": "one", "lang": "en"}\n')
    assert list(Source([f"hf:{tmp_path / 'data'}"])) == [Passage("7", "one", "", {"lang": "en"})]
    with pytest.raises(UserError, match=r"the data set .* can't be loaded"):
        list(Source([f"hf:{tmp_path / 'data'}:nowhere"]))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"content": ["x"]}, "has no column 'text', only content"),
        ({"text": [None]}, "row 0 .* has no text"),
        ({"text": ["x"], "meta": ["{"]}, "the meta of 'p-0' is not an object"),
        ({"text": ["x"], "meta": ["[1]"]}, "the meta of 'p-0' is not an object"),
    ],
)
def test_parquet_that_holds_something_else_is_refused(tmp_path, columns, message):
    path = parquet(tmp_path / "p.parquet", **columns)
    with pytest.raises(UserError, match=message):
        list(Source([path]))


def test_what_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*gone.jsonl"):
        Source([tmp_path / "gone.jsonl"])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"bad.parquet can't be read as Parquet"):
        list(Source([tmp_path / "bad.parquet"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no .parquet file"):
        list(Source([tmp_path / "empty"]))


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "mine.jsonl").write_text("{}\n")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"mine.jsonl can't be read \(Permission denied\)"):
        Source([tmp_path / "mine.jsonl"]).count()
