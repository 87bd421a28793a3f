"""An index in Milvus, for what outgrows a machine; Milvus Lite, embedded in a file, is the same with another address.

A collection has the fields `key` (primary: a hash of the id), `id`, `title`, `text`, `meta` (JSON) and `vector`. What
made it stands as JSON in the collection's description and properties.
"""

import hashlib
import json
import logging
import math
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cosup.config import UserError
from cosup.data import Passage
from cosup.index.parts import parts_of, renamed, settled
from cosup.index.prepare import Prepared, normalised
from cosup.index.protocol import Embedder, Hit, PassageTooLargeError, Vectors

T = TypeVar("T")
SCHEME = "milvus:"
FORMAT_VERSION = 1
_BATCH = 512  # rows of one request
_LONGEST = 65_535  # bytes of a text that Milvus holds
_MOST_HITS = 16_384  # of one search
_FIELDS = ("id", "title", "text", "meta")
_TYPES = {"flat": "FLAT", "hnsw": "HNSW", "auto": "AUTOINDEX", "ivf-flat": "IVF_FLAT", "ivf-pq": "IVF_PQ"}


class MilvusIndex:
    """A collection of Milvus. See `cosup.index.Index` for the methods.

    A change is visible as soon as Milvus has it, request by request: unlike a folder's, one that is interrupted is
    there in part, and is completed by making it again.

    Args:
        url: `milvus:///folder/file.db` (Milvus Lite), or `milvus://host:port/collection`; for the latter a token, or a
            user and a password, stand before the host: `milvus://user:password@host:port/collection`.

    Raises:
        UserError: pymilvus is not installed, the server can't be reached, or there is no such index.
    """

    def __init__(self, url: str):
        self._client, self._collection = _connect(url)
        self.url = _without_token(url)
        with _explained(self.url):
            if not self._client.has_collection(self._collection):
                raise UserError(f"there is no index at {self.url}: make one with `cosup index build --out {self.url}`")
            self._client.load_collection(self._collection)
        self._aliases = self._read_aliases()
        self.fingerprint, self.dim = str(self._header["fingerprint"]), int(self._header["dim"])
        self.kind = str(self._header["kind"])

    def __len__(self) -> int:
        with _explained(self.url):
            (row,) = self._client.query(self._collection, filter="", output_fields=["count(*)"])
        return int(row["count(*)"])

    def __iter__(self) -> Iterator[Passage]:
        digits = max(0, math.ceil(math.log(max(len(self), 1) / 4096, 16)))  # so that no answer is too long
        for number in range(16**digits):
            prefix = f"{number:0{digits}x}" if digits else ""
            with _explained(self.url):
                rows = self._client.query(
                    self._collection, filter=f'key like "{prefix}%"', output_fields=list(_FIELDS), limit=_MOST_HITS
                )
            yield from map(_to_passage, rows)

    def search(self, queries_QD: Vectors, k: int, *, where: Mapping[str, Any] | None = None) -> list[list[Hit]]:
        """See `Index.search`; `where` takes texts, numbers and booleans."""
        if queries_QD.ndim != 2 or queries_QD.shape[1] != self.dim:
            raise ValueError(f"queries must have shape [Q, {self.dim}], not {list(queries_QD.shape)}")
        if not len(queries_QD) or k < 1:
            return [[] for _ in queries_QD]
        with _explained(self.url):
            found = self._client.search(
                self._collection,
                data=queries_QD.astype(np.float32).tolist(),
                limit=min(k, _MOST_HITS),
                filter=_filter(where or {}),
                output_fields=["id"],
            )
        return [[Hit(hit["entity"]["id"], float(hit["distance"])) for hit in row] for row in found]

    def get(self, ids: Sequence[str]) -> list[Passage]:
        """See `Index.get`."""
        return [_to_passage(row) for row in self._rows(ids, _FIELDS)]

    def vectors(self, ids: Sequence[str]) -> Vectors:
        """See `Index.vectors`."""
        rows = [row["vector"] for row in self._rows(ids, ("id", "vector"))]
        return np.array(rows, np.float32).reshape(len(rows), self.dim)

    def add(self, passages: Sequence[Passage], vectors_PD: Vectors) -> None:
        """See `Index.add`, and the remark on changes above."""
        if vectors_PD.shape != (len(passages), self.dim):
            raise ValueError(f"vectors must have shape [{len(passages)}, {self.dim}], not {list(vectors_PD.shape)}")
        new = {passage.id: (passage, vector_D) for passage, vector_D in zip(passages, vectors_PD, strict=True)}
        rows = [_to_row(*row) for row in new.values()]
        old_parts = {part for id in new for part in parts_of(self, id)} - new.keys()
        aliases = self._read_aliases()
        lost = {id for id in set(aliases.values()) & new.keys() if self._differs(new[id][0])}
        aliases, heirs = settled(aliases, lost=lost, taken=new, new={})
        self._write([*self._under_new_ids(heirs), *rows], aliases)
        self._delete(old_parts)

    def remove(self, ids: Sequence[str]) -> int:
        """See `Index.remove`."""
        gone = {*ids, *(part for id in ids for part in parts_of(self, id))}
        known = self._read_aliases()
        aliases, heirs = settled(known, lost=gone, taken=gone, new={})
        self._write([*self._under_new_ids(heirs)], aliases)
        return self._delete(gone) + len(gone & known.keys())

    def _differs(self, passage: Passage) -> bool:
        return normalised(self.get([passage.id])[0]) != normalised(passage)

    def _under_new_ids(self, heirs: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        for old, new in heirs.items():
            ids = [old, *parts_of(self, old)]
            for passage, vector_D in zip(self.get(ids), self.vectors(ids), strict=True):
                yield _to_row(renamed(passage, old, new), vector_D)

    def _write(self, rows: list[dict[str, Any]], aliases: dict[str, str]) -> None:
        with _explained(self.url):
            for batch in _batches(rows):
                self._client.upsert(self._collection, batch)
            if aliases != self._aliases:
                _write_header(self._client, self._collection, {**self._header, "aliases": aliases})
        self._aliases = aliases

    def _delete(self, ids: Iterable[str]) -> int:
        removed = 0
        with _explained(self.url):
            for keys in _batches(map(_key, sorted(ids))):
                known = self._client.query(self._collection, filter=_among(keys), output_fields=["key"])
                if known:
                    self._client.delete(self._collection, filter=_among([row["key"] for row in known]))
                    removed += len(known)
        return removed

    def _read_aliases(self) -> dict[str, str]:
        """Those of now: another process may have changed them."""
        with _explained(self.url):
            self._header = _read_header(self._client, self._collection, self.url)
        self._aliases = dict(self._header["aliases"])
        return self._aliases

    def close(self) -> None:
        """Lets go of the connection; of Milvus Lite, so that another process can open the file."""
        self._client.close()

    def _rows(self, ids: Sequence[str], fields: Sequence[str]) -> list[Mapping[str, Any]]:
        wanted = [self._aliases.get(id, id) for id in ids]
        rows: dict[str, Mapping[str, Any]] = {}
        with _explained(self.url):
            for keys in _batches(sorted({_key(id) for id in wanted})):
                found = self._client.query(self._collection, filter=_among(keys), output_fields=list(fields))
                rows.update({row["id"]: row for row in found})
        for id, asked in zip(wanted, ids, strict=True):
            if id not in rows:
                raise KeyError(asked)
        return [rows[id] for id in wanted]


def build_milvus(
    passages: Iterable[Passage],
    embedder: Embedder,
    url: str,
    embed: Callable[[Prepared], Iterator[tuple[Passage, Vectors]]],
    *,
    kind: str = "auto",
) -> MilvusIndex:
    """Writes a collection, and puts it in the place of the one that was there when it is complete.

    Args:
        passages: with distinct ids.
        embedder: the model.
        url: see `MilvusIndex`.
        embed: gives the prepared passages with the vector [D] of each.
        kind: `auto`, `flat`, `hnsw`, `ivf-flat`, `ivf-pq`, as far as the server has them.

    Raises:
        UserError: there are no passages, Milvus refuses one, or can't be reached.
    """
    if kind not in _TYPES:
        raise UserError(f"Milvus has no kind {kind!r}; use one of {', '.join(_TYPES)}")
    client, collection = _connect(url)
    building, old = f"{collection}_building", f"{collection}_old"
    prepared = Prepared(passages, embedder)
    with _explained(_without_token(url)):
        client.drop_collection(building)
        _create(client, building, embedder.dim, kind)
        count = 0
        for batch in _batches(embed(prepared)):
            client.upsert(building, [_to_row(passage, vector_D) for passage, vector_D in batch])
            count += len(batch)
        if not count:
            client.drop_collection(building)
            raise UserError("the corpus is empty: name a file with at least one passage")
        header = {"format_version": FORMAT_VERSION, "fingerprint": embedder.fingerprint, "dim": embedder.dim}
        header |= {"kind": kind, "aliases": prepared.aliases}
        _write_header(client, building, header)
        if client.has_collection(collection):
            client.drop_collection(old)
            client.rename_collection(collection, old)
        client.rename_collection(building, collection)
        client.drop_collection(old)
    client.close()
    return MilvusIndex(url)


def _connect(url: str) -> tuple[Any, str]:
    try:
        from pymilvus import MilvusClient
    except ImportError:
        raise UserError("Milvus is not installed: run `pip install 'cosup[milvus]'`") from None
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs what it raises too
    parts, shown = urllib.parse.urlsplit(url), _without_token(url)
    try:
        port = parts.port or 19530
    except ValueError as e:
        raise UserError(f"{shown!r} is no address of Milvus ({e}); write milvus://host:19530/collection") from None
    if parts.scheme + ":" != SCHEME or not parts.path.strip("/"):
        raise UserError(f"{shown!r} is no address of Milvus; write milvus:///file.db or milvus://host:19530/collection")
    with _explained(shown):
        if not parts.hostname:
            place = Path(urllib.parse.unquote(parts.path))
            place.parent.mkdir(parents=True, exist_ok=True)
            return MilvusClient(str(place)), "cosup"
        token = urllib.parse.unquote(parts.netloc.rpartition("@")[0])
        return MilvusClient(f"http://{parts.hostname}:{port}", token=token), parts.path.strip("/")


def _without_token(url: str) -> str:
    """The address as it may be shown."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if "@" in parts.netloc else url


def _create(client: Any, collection: str, dim: int, kind: str) -> None:
    from pymilvus import DataType

    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=32)
    for name in ("id", "title", "text"):
        schema.add_field(name, DataType.VARCHAR, max_length=_LONGEST)
    schema.add_field("meta", DataType.JSON)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
    index = client.prepare_index_params()
    index.add_index("vector", index_type=_TYPES[kind], metric_type="IP")
    client.create_collection(collection, schema=schema, index_params=index, consistency_level="Strong")


def _write_header(client: Any, collection: str, header: Mapping[str, Any]) -> None:
    client.alter_collection_properties(collection, properties={"cosup": json.dumps(header)})


def _read_header(client: Any, collection: str, url: str) -> dict[str, Any]:
    properties = client.describe_collection(collection).get("properties", {})
    try:
        header: dict[str, Any] = json.loads(properties["cosup"])
        version = int(header["format_version"])
    except (KeyError, ValueError, TypeError):
        raise UserError(f"the collection at {url} was not written by cosup; name another") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{url} has format version {version}, and this cosup reads {FORMAT_VERSION}; build it again")
    return header


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turns what Milvus raises into one sentence."""
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except MilvusException as e:
        reason = str(getattr(e, "message", "") or e).strip().splitlines()[0]
        raise UserError(
            f"Milvus at {url} refuses ({reason}); see that it runs, and that no other process has a local file open"
        ) from e


def _filter(where: Mapping[str, Any]) -> str:
    for key, value in where.items():
        if not isinstance(value, (str, int, float)):
            raise UserError(f"Milvus filters by texts, numbers and booleans, and {key!r} is {value!r:.60}")
    literals = {key: json.dumps(value, ensure_ascii=False) for key, value in where.items()}
    return " and ".join(f"meta[{json.dumps(key, ensure_ascii=False)}] == {value}" for key, value in literals.items())


def _key(id: str) -> str:
    return hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _among(keys: Sequence[str]) -> str:
    return f"key in {json.dumps(list(keys))}"


def _to_row(passage: Passage, vector_D: Vectors) -> dict[str, Any]:
    row = {"id": passage.id, "title": passage.title, "text": passage.text}
    for name, text in row.items():
        if (size := len(text.encode())) > _LONGEST:
            raise PassageTooLargeError(
                f"the {name} of passage {passage.id[:40]!r} has {size:,} bytes, and Milvus holds {_LONGEST:,}: "
                "split it, for instance with `cosup ingest`"
            )
    return {"key": _key(passage.id), **row, "meta": passage.meta, "vector": np.asarray(vector_D, np.float32)}


def _to_passage(row: Mapping[str, Any]) -> Passage:
    meta = json.loads(row["meta"]) if isinstance(row["meta"], (str, bytes)) else dict(row["meta"] or {})
    return Passage(row["id"], row["text"], row["title"], meta)


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
