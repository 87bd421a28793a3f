"""The model as an index is handed it: it embeds, measures passages, and can be made anew in another process."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cosup.config import UserError
from cosup.data import Example, Passage
from cosup.index import Index
from cosup.model import CoSupModel


class ModelEmbedder:
    """A model with what `cosup.index.MeasuringEmbedder` asks for.

    Args:
        model: opened for inference.
    """

    def __init__(self, model: CoSupModel):
        self.model = model
        settings = model.settings
        self.max_tokens = model.passage_limit
        self.layout = {
            "passage template": settings.template.passage,
            "end token": str(settings.template.end_token),
            "similarity": settings.similarity,
            "limit of tokens": str(settings.template.max_passage_tokens),
        }

    @property
    def fingerprint(self) -> str:
        """Of all that a vector depends on."""
        return self.model.fingerprint

    @property
    def dim(self) -> int:
        """D, size of a vector."""
        return self.model.dim

    def embed_passages(self, passages: Sequence[Passage]) -> npt.NDArray[np.float32]:
        """Vectors [P, D], in order."""
        return self.model.embed_passages(passages)

    def count_tokens(self, passages: Sequence[Passage]) -> list[int]:
        """How many tokens Emb_seq would read of each passage, were there no limit."""
        template = self.model.template
        texts = [template.passage_text(passage) for passage in passages]
        encoded = template.emb_tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, verbose=False
        ).input_ids
        return [len(ids) + self._added for ids in encoded]

    @cached_property
    def _added(self) -> int:
        """Tokens that stand around every passage."""
        whole = self.model.template.embedded(Passage("-", "a"), max_tokens=1 << 20)
        return len(whole) - len(
            self.model.template.emb_tokenizer("a", add_special_tokens=False, split_special_tokens=True).input_ids
        )


@dataclass(frozen=True, slots=True)
class OpenModel:
    """Opens a model folder in a worker process; on a machine with several GPUs, each worker has its own.

    Args:
        folder: a model folder, or a run folder, that the worker can read.
        threads: of each worker; 0 leaves it to torch.
    """

    folder: Path
    threads: int = 0

    def __call__(self, worker: int) -> ModelEmbedder:
        """The embedder of the worker with this number."""
        import torch

        if self.threads:
            torch.set_num_threads(self.threads)
        gpus = torch.cuda.device_count()
        return ModelEmbedder(CoSupModel.load(self.folder, device=f"cuda:{worker % gpus}" if gpus else None))


class ContextQueries:
    """Gen's states at each `[Ret]` of training examples, in their own contexts: what mining searches with.

    Args:
        model: the current one.
        index: holds the passages that the examples cite.
    """

    def __init__(self, model: CoSupModel, index: Index):
        self._model, self._index = model, index

    def __call__(self, examples: Sequence[Example]) -> list[npt.NDArray[np.float32]]:
        """States [K, D] of each example, one for each of its retrievals."""
        contexts = [self._contexts(example) for example in examples]
        flat = [context for own in contexts for context in own]
        states_QD = self._model.query(flat) if flat else np.zeros((0, self._model.dim), np.float32)
        ends = np.cumsum([len(own) for own in contexts])
        return np.split(states_QD, ends[:-1])

    def _contexts(self, example: Example) -> list[list[int]]:
        cited = [part.passage for part in example.evidence]
        try:
            passages = dict(zip(cited, self._index.get(cited), strict=True))
        except KeyError as e:
            raise UserError(
                f"example {example.id!r} cites passage {e.args[0]!r}, which the index does not hold; "
                "build it from all passages"
            ) from None
        rendered = self._model.template.render(example, passages)
        return [rendered.ids[:place] for place in rendered.ret]
