"""NLI models that say whether a premise entails a hypothesis; batched, and cached by pair."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from cosup.config import UserError
from cosup.metrics import Pair

_BATCH = 16


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
        self._known = dict(_read_cache(self._path))

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

    Args:
        name: of the model, or its folder.

    Raises:
        UserError: it can't be loaded, or is neither.
    """

    def __init__(self, name: str):
        from transformers import AutoConfig, AutoTokenizer

        self.name = name
        try:
            config = AutoConfig.from_pretrained(name)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as e:
            reason = str(e).splitlines()[0]
            raise UserError(f"the NLI model {name} can't be loaded ({reason}); name a folder or a model") from None
        self._entailment = entailment_label(config)
        self._model = _load(name, classifier=self._entailment is not None)

    @torch.inference_mode()
    def entails(self, pairs: Sequence[Pair]) -> list[bool]:
        """See `Nli.entails`."""
        if self._entailment is None:
            texts: list[Any] = [[f"premise: {premise} hypothesis: {hypothesis}" for premise, hypothesis in pairs]]
        else:
            texts = [[premise for premise, _ in pairs], [hypothesis for _, hypothesis in pairs]]
        batch = self._tokenizer(*texts, padding=True, truncation=True, return_tensors="pt").to(self._model.device)
        if self._entailment is not None:
            chosen = self._model(**batch).logits.argmax(-1).tolist()
            return [row == self._entailment for row in chosen]
        written = self._model.generate(**batch, max_new_tokens=4, do_sample=False)
        return [said.strip() == "1" for said in self._tokenizer.batch_decode(written, skip_special_tokens=True)]


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


def _load(name: str, *, classifier: bool) -> Any:
    from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if classifier else AutoModelForSeq2SeqLM
    model = kind.from_pretrained(name).eval()
    return model.to("cuda") if torch.cuda.is_available() else model


def _key(pair: Pair) -> str:
    return hashlib.sha256("\0".join(pair).encode()).hexdigest()


def _read_cache(path: Path) -> Iterator[tuple[str, bool]]:
    if not path.is_file():
        return
    for line in path.read_text("utf-8").splitlines():
        try:
            row = json.loads(line)
            yield row["pair"], row["entails"]
        except (ValueError, KeyError, TypeError):  # a line that a kill cut short
            continue
