"""Where passages come from: JSON Lines, Parquet, or a data set of the Hugging Face Hub."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cosup.config import UserError
from cosup.data import Passage, read_passages

HUB = "hf:"
_OWN = ("id", "text", "title", "meta")


class Source:
    """The passages of some files or data sets, read anew each time they are asked for.

    Args:
        names: JSONL files, plain or gzipped; Parquet files, or folders of them; `hf:NAME` or `hf:NAME:SPLIT` for a data
            set of the Hub or a local folder that `datasets` reads (split `train` without one).

    Parquet and data sets need a column `text`, and may have `id`, `title` and `meta` (JSON text or a struct); without
    `id`, the number of the row stands for it, and every other column goes into `meta`.

    Raises:
        UserError: one of them is not there; while reading, one can't be read or holds something else.
    """

    def __init__(self, names: Sequence[str | Path]):
        self.names = [str(name) for name in names]
        for name in self.names:
            if not name.startswith(HUB) and not Path(name).exists():
                raise UserError(
                    f"there is no file {name}; name a file of passages (JSONL or Parquet), or {HUB}NAME for a data set"
                )

    def __iter__(self) -> Iterator[Passage]:
        jsonl = [Path(name) for name in self.names if _kind(name) == "jsonl"]
        others = (_read(name) for name in self.names if _kind(name) != "jsonl")
        return chain(read_passages(*jsonl), *others)

    def count(self) -> int | None:
        """How many passages there are; None where telling would mean reading a data set."""
        counts = [_count(name) for name in self.names]
        return None if None in counts else sum(count for count in counts if count is not None)


def _kind(name: str) -> str:
    if name.startswith(HUB):
        return "hub"
    path = Path(name)
    return "parquet" if path.suffix == ".parquet" or path.is_dir() else "jsonl"


def _read(name: str) -> Iterator[Passage]:
    return _read_hub(name) if _kind(name) == "hub" else chain.from_iterable(map(_read_parquet, _parquet_files(name)))


def _count(name: str) -> int | None:
    if _kind(name) == "hub":
        return None
    if _kind(name) == "parquet":
        return sum(int(_opened(path).metadata.num_rows) for path in _parquet_files(name))
    return sum(1 for _ in read_passages(Path(name))) if name.endswith(".gz") else _lines(Path(name))


def _lines(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return sum(1 for line in file if line.strip())
    except OSError as e:
        raise UserError(f"{path} can't be read ({e.strerror or e}); mend that, or name another file") from None


def _parquet_files(name: str) -> list[Path]:
    path = Path(name)
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"the folder {name} holds no .parquet file; name one that does, or a JSONL file")
    return files


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{path} can't be read as Parquet ({str(e).splitlines()[0]}); mend it, or leave it out") from e


def _read_parquet(path: Path) -> Iterator[Passage]:
    file = _opened(path)
    _refuse_columns(str(path), file.schema_arrow.names)
    rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(1024))
    try:
        yield from _passages(rows, str(path))
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{path} is damaged ({str(e).splitlines()[0]}); copy or download it again") from e


def _read_hub(name: str) -> Iterator[Passage]:
    try:
        import datasets
    except ImportError:
        raise UserError("data sets need a package that is not installed: run `pip install datasets`") from None
    place, _, split = name.removeprefix(HUB).partition(":")
    try:
        data = datasets.load_dataset(place, split=split or "train")
    except (OSError, ValueError) as e:
        reason = (str(e) or type(e).__name__).strip().splitlines()[0]
        raise UserError(f"the data set {place!r} can't be loaded ({reason}); check its name, split and access") from e
    _refuse_columns(name, data.column_names)
    yield from _passages(data, name)


def _refuse_columns(name: str, columns: Sequence[str]) -> None:
    if "text" not in columns:
        raise UserError(f"{name} has no column 'text', only {', '.join(columns)}; rename the one that is to be read")


def _passages(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Passage]:
    stem = Path(name.removeprefix(HUB)).stem
    for number, row in enumerate(rows):
        given = row.get("id")
        id = f"{stem}-{number}" if given is None else str(given)
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise UserError(f"{name}: row {number} ({id}) has no text; leave it out")
        rest = {key: value for key, value in row.items() if key not in _OWN and value is not None}
        yield Passage(
            id, row["text"], str(row.get("title") or ""), _plain({**_meta(row.get("meta"), name, id), **rest})
        )


def _meta(raw: Any, name: str, id: str) -> dict[str, Any]:
    try:
        meta = json.loads(raw) if isinstance(raw, str) and raw else raw or {}
    except ValueError:
        meta = None
    if not isinstance(meta, dict):
        raise UserError(f"{name}: the meta of {id!r} is not an object but {raw!r:.60}; write JSON such as {{}}")
    return meta


def _plain(meta: dict[str, Any]) -> dict[str, Any]:
    """Dates and the like, of which JSON knows nothing, as text."""
    plain: dict[str, Any] = json.loads(json.dumps(meta, default=str))
    return plain
