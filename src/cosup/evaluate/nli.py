"""NLI models that say whether a premise entails a hypothesis; batched, and cached by pair."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from cosup.config import UserError
from cosup.evaluate.journal import read_journal
from cosup.evaluate.judges import load_part, load_weights
from cosup.metrics import Pair

_ROLE = "the NLI model"
_BATCH = 16
_ENDLESS = 1 << 20


class Nli(Protocol):
    """What judges pairs."""

    name: str

    def entails(self, pairs: Sequence[Pair]) -> list[bool]:
        """Whether the premise of each pair entails its hypothesis."""
        ...


class CachedNli:
    """An NLI model whose judgements are kept in a file, one line a pair, so that no pair is judged twice.

    Args:
        nli: the model.
        folder: where its file is kept; the file's name tells the model.
    """

    def __init__(self, nli: Nli, folder: Path):
        self._nli = nli
        self._path = folder / f"nli-{hashlib.sha256(nli.name.encode()).hexdigest()[:12]}.jsonl"
        rows = read_journal(self._path, consequence="its pairs are judged again")
        self._known: dict[str, bool] = {row["pair"]: row["entails"] for row in rows}

    def judge(self, pairs: Iterable[Pair], *, on_progress: Callable[[int], None] = lambda done: None) -> None:
        """Has every pair that is not known judged; afterwards `entails` knows it."""
        missing = list(dict.fromkeys(pair for pair in pairs if _key(pair) not in self._known))
        missing.sort(key=lambda pair: len(pair[0]) + len(pair[1]))  # little padding
        done = 0
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            for start in range(0, len(missing), _BATCH):
                batch = missing[start : start + _BATCH]
                for pair, entails in zip(batch, self._nli.entails(batch), strict=True):
                    self._known[_key(pair)] = entails
                    file.write(json.dumps({"pair": _key(pair), "entails": entails}) + "\n")
                file.flush()
                on_progress(done := done + len(batch))

    def entails(self, pair: Pair) -> bool:
        """The judgement on a pair that `judge` was given."""
        return self._known[_key(pair)]


class HuggingFaceNli:
    """A Hugging Face model: one that writes 1 or 0 (TRUE), or a classifier of pairs with an entailment label.

    A pair that is longer than the model reads loses words of its premise; a hypothesis is cut only where it alone is
    longer.

    Args:
        name: of the model, or its folder.

    Raises:
        UserError: it can't be loaded, or is neither.
    """

    def __init__(self, name: str):
        from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

        self.name = name
        config = load_part(AutoConfig, name, role=_ROLE)
        self._tokenizer = load_part(AutoTokenizer, name, role=_ROLE)
        self._entailment = entailment_label(config)
        self._limit = getattr(config, "max_position_embeddings", None)
        if self._entailment is None:
            self._tokenizer.truncation_side = "left"  # the hypothesis stands at the end
        else:
            self._limit = min(self._limit or _ENDLESS, self._tokenizer.model_max_length)
        kind = AutoModelForSeq2SeqLM if self._entailment is None else AutoModelForSequenceClassification
        self._model = load_weights(kind, name, role=_ROLE)

    @torch.inference_mode()
    def entails(self, pairs: Sequence[Pair]) -> list[bool]:
        """See `Nli.entails`."""
        if self._entailment is None:
            return self._written(pairs)
        room = self._limit - self._tokenizer.num_special_tokens_to_add(pair=True)
        fits = {pair: len(self._tokenizer.encode(pair[1], add_special_tokens=False)) < room for pair in pairs}
        judged = self._classified([pair for pair in fits if fits[pair]], cut="only_first")
        judged |= self._classified([pair for pair in fits if not fits[pair]], cut="longest_first")
        return [judged[pair] for pair in pairs]

    def _classified(self, pairs: Sequence[Pair], *, cut: str) -> dict[Pair, bool]:
        if not pairs:
            return {}
        batch = self._tokens([premise for premise, _ in pairs], [hypothesis for _, hypothesis in pairs], cut=cut)
        chosen = self._model(**batch).logits.argmax(-1).tolist()
        return {pair: row == self._entailment for pair, row in zip(pairs, chosen, strict=True)}

    def _written(self, pairs: Sequence[Pair]) -> list[bool]:
        texts = [f"premise: {premise} hypothesis: {hypothesis}" for premise, hypothesis in pairs]
        batch = self._tokens(texts, cut=self._limit is not None)
        written = self._model.generate(**batch, max_new_tokens=4, do_sample=False)
        return [said.strip() == "1" for said in self._tokenizer.batch_decode(written, skip_special_tokens=True)]

    def _tokens(self, *texts: list[str], cut: str | bool) -> Any:
        batch = self._tokenizer(*texts, padding=True, truncation=cut, max_length=self._limit, return_tensors="pt")
        return batch.to(self._model.device)


def entailment_label(config: Any) -> int | None:
    """The number of a classifier's entailment label; None for a model that writes its judgement.

    Raises:
        UserError: it neither classifies with such a label nor is sequence to sequence.
    """
    kinds = " ".join(getattr(config, "architectures", None) or ())
    if "ForSequenceClassification" in kinds:
        labels = {str(label).lower(): number for number, label in config.id2label.items()}
        found = [number for label, number in labels.items() if label.startswith("entail")]
        if len(found) == 1:
            return int(found[0])
        raise UserError(f"the NLI model has no entailment label among {', '.join(labels)}; name one that has")
    if "ForConditionalGeneration" in kinds:
        return None
    raise UserError(f"an NLI model must classify pairs or be sequence to sequence, not {kinds or 'something else'}")


def _key(pair: Pair) -> str:
    return hashlib.sha256("\0".join(pair).encode()).hexdigest()
