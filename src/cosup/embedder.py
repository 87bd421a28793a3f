"""The model as an index is handed it: it embeds, measures passages, and can be made anew in another process."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cosup.data import Passage
from cosup.model import CoSupModel


class ModelEmbedder:
    """A model with what `cosup.index.MeasuringEmbedder` asks for.

    Args:
        model: opened for inference.
    """

    def __init__(self, model: CoSupModel):
        self.model = model
        settings = model.settings
        self.max_tokens = min(settings.template.max_passage_tokens, model.context)
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
