"""Training data: read from the files of a recipe, tokenised once, kept as Arrow, mapped into memory.

Shapes: S packed tokens.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow as pa
from torch.utils.data import Dataset

from cosup.config import DataSection, Recipe, UserError
from cosup.data import Example, Passage, kind_of, read_examples, read_passages, read_questions
from cosup.data.convert import DEFAULT_RULE, TASKS, convert
from cosup.files import atomic_folder, cache_folder, explained, sha256
from cosup.template import Template
from cosup.train.rows import Row, passage_key, row_of

logger = logging.getLogger(__name__)

_FORMAT = 3
_MARKER = "tokenized.json"
_BATCH = 512  # rows written together, tokenised by one process
_WORTH = 1 << 20  # bytes of examples for which other processes are worth their start, some seconds each
_PARTS = ("examples", "dev")
_KEYS = pa.list_(pa.int64())
_ROWS = pa.schema(
    {
        "id": pa.string(),
        "group": pa.int64(),
        "ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "ret": pa.list_(pa.int32()),
        "gold": _KEYS,
        "ignored": pa.list_(_KEYS),
        "negatives": pa.list_(_KEYS),
    }
)
_PASSAGES = pa.schema({"key": pa.int64(), "ids": pa.list_(pa.int32())})


class Rows(Dataset[Row]):
    """Tokenised examples of a file, mapped; a row is read when it is asked for."""

    def __init__(self, path: Path):
        self._reader = _opened(path)
        self._batch = lru_cache(maxsize=64)(self._reader.get_batch)
        self._starts = _starts(self._reader)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> Row:
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        (values,) = self._batch(batch).slice(row - int(self._starts[batch]), 1).to_pylist()
        return Row(**values)

    def groups(self) -> list[int]:
        """What stands for the title of each example's first passage."""
        columns = (self._reader.get_batch(i)["group"] for i in range(self._reader.num_record_batches))
        return [int(group) for column in columns for group in column.to_numpy()]


class Sequences(Mapping[int, Sequence[int]]):
    """Ids that Emb_seq reads, by `passage_key`, mapped."""

    def __init__(self, path: Path):
        self._reader = _opened(path)
        self._batch = lru_cache(maxsize=64)(self._reader.get_batch)
        self._starts = _starts(self._reader)
        columns = [self._reader.get_batch(i)["key"].to_numpy() for i in range(self._reader.num_record_batches)]
        self._keys = np.concatenate([np.zeros(0, np.int64), *columns])  # ascending

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[int]:
        return (int(key) for key in self._keys)

    def __getitem__(self, key: int) -> Sequence[int]:
        row = int(np.searchsorted(self._keys, key))
        if row == len(self._keys) or self._keys[row] != key:
            raise KeyError(key)
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        ids: list[int] = self._batch(batch)["ids"][row - int(self._starts[batch])].as_py()
        return ids


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What a recipe's `data` names: read, checked and tokenised.

    Args:
        examples: those that fit.
        dev: examples to judge by.
        sequences: of the passages that they cite.
        left_out: how many questions or examples were not used, by reason.
        shortened: how many passages were longer than `data.max_passage_tokens`.
        passages: how many there are, cited or not.
    """

    examples: Rows
    dev: Rows
    sequences: Sequences
    left_out: Counter[str]
    shortened: int
    passages: int


def load_data(recipe: Recipe, template: Template, *, context: int | None = None) -> TrainingData:
    """The training data of a recipe; what was tokenised before, with the same text and template, is only opened.

    It is kept in the user's cache folder, under a name that follows from the files' bytes, the tokenizers, the template
    and the settings that matter. Of several processes that start at once, one tokenises and the others wait.

    Args:
        recipe: names the files.
        template: the model's.
        context: how many tokens Gen reads; examples longer than that are left out, as are those longer than
            `data.max_tokens`.

    Raises:
        UserError: a file is missing or malformed, a citation leads nowhere, nothing is left to train on, or the cache
            folder can't be written.
    """
    if context is not None and context < recipe.data.max_tokens:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_tokens": context})})
    folder = cache_folder() / "tokenized" / _name(recipe, template)
    with explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.with_suffix(".lock")):
            return _open(folder) or _made(recipe, template, folder)


def _made(recipe: Recipe, template: Template, folder: Path) -> TrainingData:
    if folder.exists():
        logger.warning("%s is damaged; the data is tokenised again", folder)
        shutil.rmtree(folder)
    with atomic_folder(folder, marker=_MARKER) as new:
        _build(recipe, template, new)
    opened = _open(folder)
    assert opened is not None
    return opened


def _open(folder: Path) -> TrainingData | None:
    """What is there; None where nothing is, or it is not whole."""
    try:
        told = json.loads((folder / _MARKER).read_text("utf-8"))
        if any((folder / name).stat().st_size != size for name, size in told["bytes"].items()):
            return None
        examples, dev = (Rows(folder / f"{part}.arrow") for part in _PARTS)
        sequences = Sequences(folder / "passages.arrow")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # pyarrow's errors are ValueErrors
        return None
    return TrainingData(examples, dev, sequences, Counter(told["left_out"]), told["shortened"], told["passages"])


def _name(recipe: Recipe, template: Template) -> str:
    """Of all that the tokenised data depends on."""
    section = recipe.data
    named = (section.passages, section.train, section.dev)
    depends = {
        "format": _FORMAT,
        "rules": {task: asdict(rule) for task, rule in (TASKS | {"": DEFAULT_RULE}).items()},
        "files": [[_hash(section.resolve(path)) for path in paths] for paths in named],
        "max_tokens": section.max_tokens,
        "only_with_retrieval": section.only_with_retrieval,
        "train_on_passages": recipe.train.train_on_passages,
        "template": template.settings.model_dump(mode="json"),
        "frames": template.frames,
        "tokenizers": [t.backend_tokenizer.to_str() for t in (template.tokenizer, template.emb_tokenizer)],
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]


def _hash(path: Path) -> str:
    try:
        return sha256(path)
    except OSError:
        return ""  # whoever reads it says what is wrong


def _build(recipe: Recipe, template: Template, folder: Path) -> None:
    section, on_passages = recipe.data, recipe.train.train_on_passages
    passages = {p.id: p for p in read_passages(*map(section.resolve, section.passages))}
    left_out: Counter[str] = Counter()
    shortened: set[str] = set()
    cited: set[str] = set()
    counts = {}
    with _workers(section, template) as run:
        for part, paths in zip(_PARTS, (section.train, section.dev), strict=True):
            examples = _noting(_read(section, paths, passages, left_out), cited)
            jobs = ((chunk, _of(chunk, passages), on_passages) for chunk in _chunks(examples))
            tables = _fitting(run(_tokenized, jobs), section.max_tokens, left_out, shortened)
            counts[part] = _write(folder / f"{part}.arrow", _ROWS, tables)
        if unknown := sorted(cited - passages.keys()):
            raise UserError(
                f"the examples name {unknown[0]!r}{f' and {len(unknown) - 1:,} others' if unknown[1:] else ''} as gold "
                "or negative, which no file of data.passages holds; add the file that they were mined from"
            )
        ordered = sorted(cited, key=passage_key)
        read = (([passages[id] for id in chunk],) for chunk in _chunks(ordered))
        _write(folder / "passages.arrow", _PASSAGES, _sequences(run(_embedded, read), shortened))
    left_out += Counter()  # drops what is zero
    if not counts["examples"]:
        raise UserError(f"there is nothing to train on: {_reasons(left_out)}")
    if section.dev and not counts["dev"]:
        raise UserError(f"there is nothing to judge by in data.dev: {_reasons(left_out)}")
    told = {
        "left_out": left_out,
        "shortened": len(shortened),
        "passages": len(passages),
        "bytes": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    (folder / _MARKER).write_text(json.dumps(told, indent=1), "utf-8")


def _read(
    section: DataSection, paths: Sequence[Path], passages: Mapping[str, Passage], left_out: Counter[str]
) -> Iterator[Example]:
    for path in map(section.resolve, paths):
        if kind_of(path) == "questions":
            found = convert(read_questions(path), passages=passages, left_out=left_out)
        else:
            found = iter(read_examples(path))
        for example in found:
            if section.only_with_retrieval and not example.evidence:
                left_out["retrieves nothing"] += 1
            else:
                yield example


def _noting(examples: Iterable[Example], cited: set[str]) -> Iterator[Example]:
    for example in examples:
        for part in example.evidence:
            cited.update((part.passage, *part.negatives))
        yield example


def _of(examples: Sequence[Example], passages: Mapping[str, Passage]) -> dict[str, Passage]:
    """The passages that these examples insert."""
    ids = {part.passage for example in examples for part in example.evidence}
    return {id: passages[id] for id in ids if id in passages}


def _tokenized(
    template: Template, examples: Sequence[Example], passages: Mapping[str, Passage], on_passages: bool
) -> tuple[list[Row], set[str]]:
    template.shortened.clear()
    rows = [row_of(example, template, passages, train_on_passages=on_passages) for example in examples]
    return rows, set(template.shortened)


def _embedded(template: Template, passages: Sequence[Passage]) -> tuple[list[tuple[int, list[int]]], set[str]]:
    template.shortened.clear()
    limit = template.settings.max_passage_tokens
    rows = [(passage_key(p.id), template.embedded(p, max_tokens=limit)) for p in passages]
    return rows, set(template.shortened)


def _reasons(left_out: Mapping[str, int]) -> str:
    told = [f"{count:,} left out ({reason})" for reason, count in left_out.items()]
    return ", ".join(told) or "the files hold no examples"


def _fitting(
    done: Iterable[tuple[list[Row], set[str]]], limit: int, left_out: Counter[str], shortened: set[str]
) -> Iterator[list[dict[str, Any]]]:
    for rows, short in done:
        shortened |= short
        fitting = [row._asdict() for row in rows if len(row.ids) <= limit]
        left_out[f"longer than {limit:,} tokens"] += len(rows) - len(fitting)
        yield fitting


def _sequences(
    done: Iterable[tuple[list[tuple[int, list[int]]], set[str]]], shortened: set[str]
) -> Iterator[list[dict[str, Any]]]:
    for rows, short in done:
        shortened |= short
        yield [{"key": key, "ids": ids} for key, ids in rows]


def _write(path: Path, schema: pa.Schema, batches: Iterable[list[dict[str, Any]]]) -> int:
    """Writes batches as they come. Returns how many rows there were."""
    count = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for rows in batches:
            count += len(rows)
            if rows:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
    return count


@contextmanager
def _workers(section: DataSection, template: Template) -> Iterator[Callable[[Any, Iterator[Any]], Iterator[Any]]]:
    """A map of work over jobs, in order: in other processes where there is enough to do."""
    files = filter(Path.is_file, map(section.resolve, section.train))  # whoever reads the others says what is wrong
    size = sum(path.stat().st_size for path in files)
    processes = min(os.cpu_count() or 1, 16)
    if size < _WORTH or processes == 1:
        yield lambda work, jobs: (work(template, *job) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy threads that hold locks
    with ProcessPoolExecutor(processes, context, _begin, (template,)) as pool:
        yield partial(_ahead, pool, 2 * processes)


_of_process: list[Template] = []  # the template that a worker was started with


def _begin(template: Template) -> None:
    _of_process[:] = [template]


def _do(work: Any, job: Any) -> Any:
    return work(_of_process[0], *job)


def _ahead(pool: ProcessPoolExecutor, most: int, work: Any, jobs: Iterator[Any]) -> Iterator[Any]:
    """Results in order, with so many jobs under way, so that memory stays flat."""
    waiting = deque(pool.submit(_do, work, job) for job in islice(jobs, most))
    while waiting:
        yield waiting.popleft().result()
        waiting += [pool.submit(_do, work, job) for job in islice(jobs, 1)]


def _chunks(items: Iterable[Any]) -> Iterator[list[Any]]:
    stream = iter(items)
    while chunk := list(islice(stream, _BATCH)):
        yield chunk


def _opened(path: Path) -> Any:
    return pa.ipc.open_file(pa.memory_map(str(path)))


def _starts(reader: Any) -> Any:
    return np.cumsum([0, *(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))])
