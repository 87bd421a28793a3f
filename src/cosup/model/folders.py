"""Model folders on disk: `gen/`, `emb/`, `projection.safetensors` and `cosup.json`."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from cosup.config import LoraSection, ModelSection, Similarity, UserError
from cosup.files import atomic_folder, sha256
from cosup.model import adapters
from cosup.model.lms import ADAPTER_CONFIG, body_of, find_model, is_adapter_folder, quiet, without_pooler
from cosup.template import TemplateSettings, Tokenizer

if TYPE_CHECKING:
    from cosup.model.core import CoSupModel

FORMAT_VERSION = 1


class AnswerSettings(BaseModel):
    """How answers of a model are best written, as its author found; see `cosup.engine.Options`.

    Args:
        quote: whether claims are words of their passage.
        statements: whether claims become what their passage states.
        hybrid: what words count in a search, 0 or more.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    quote: bool = False
    statements: bool = False
    hybrid: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class ModelSettings(BaseModel):
    """What `cosup.json` of a model folder says besides the weights.

    Args:
        format_version: of the folder.
        similarity: cosine vectors come out normalised, so that everybody scores by inner product.
        temperature: tau of L_NSP.
        pooling: what of Emb_seq's states is a passage's vector: that of the last token, or the mean; `auto` is `last`
            for decoders and `mean` for encoders.
        emb_is_gen: whether Emb_seq is Gen's own body; `emb/` is absent then.
        emb_layers: how many of its base's layers an adapted Emb_seq keeps.
        retriever: whether Emb_seq encodes the queries too, apart from Gen.
        template: the layout of text.
        answers: what holds where a request says nothing else.
        fingerprint: of all that a passage's vector depends on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = FORMAT_VERSION
    similarity: Similarity = "cosine"
    temperature: float = 0.05
    pooling: Literal["auto", "last", "mean"] = "auto"
    emb_is_gen: bool = False
    emb_layers: int | None = None
    retriever: bool = False
    template: TemplateSettings = TemplateSettings()
    answers: AnswerSettings = AnswerSettings()
    fingerprint: str = ""

    @classmethod
    def of(cls, section: ModelSection, template: TemplateSettings, *, retriever: bool) -> Self:
        """Those of the model that a recipe's `model` starts."""
        return cls(
            similarity=section.similarity,
            temperature=section.temperature,
            pooling=section.pooling,
            emb_is_gen=section.emb == "gen",
            emb_layers=section.emb_layers,
            retriever=retriever,
            template=template,
        )


class Parts(NamedTuple):
    """What a model folder holds."""

    gen: Any
    emb: Any
    tokenizer: Tokenizer
    emb_tokenizer: Tokenizer
    projection: dict[str, Tensor]
    settings: ModelSettings


def write(model: "CoSupModel", folder: Path, *, card: str) -> ModelSettings:
    """Writes a model folder whole or not at all, and returns the settings with the new fingerprint."""
    with atomic_folder(folder, marker="cosup.json") as new, quiet():
        _save_part(model.gen, model.template.tokenizer, new / "gen")
        if not model.settings.emb_is_gen:
            _save_part(model.emb, model.template.emb_tokenizer, new / "emb", again=model.template.tokenizer)
        if model.projection is not None:
            save_file({"weight": model.projection.weight.detach().contiguous()}, new / "projection.safetensors")
        settings = model.settings.model_copy(update={"fingerprint": _fingerprint(new, model.settings)})
        (new / "cosup.json").write_text(settings.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (new / "README.md").write_text(card, encoding="utf-8")
    return settings


def read(folder: Path, dtype: torch.dtype, *, lora: LoraSection | None = None) -> Parts:
    """Opens a model folder, or that of a run. Raises UserError for what `CoSupModel.load` says.

    With `lora`, adapters stay adapters that can be trained, and what has none is frozen.
    """
    folder = find_model(folder)
    settings = read_settings(folder)
    for part in ("gen",) if settings.emb_is_gen else ("gen", "emb"):
        if not (folder / part).is_dir():  # it would be taken for a name of the Hub
            raise UserError(f"{folder / part} is missing: copy the model again, or export it again")
    for file in folder.rglob("*.safetensors"):
        if not os.access(file, os.R_OK):  # safetensors would say that there is no such file
            raise UserError(f"{file} can't be read by this user; let its owner allow it, for instance with chmod a+r")
    with quiet(), _explained(folder):
        tokenizer = emb_tokenizer = AutoTokenizer.from_pretrained(folder / "gen")
        gen = _load_part(folder / "gen", AutoModelForCausalLM, dtype, settings, lora)
        emb = body_of(gen) if settings.emb_is_gen else _load_part(folder / "emb", AutoModel, dtype, settings, lora)
        if (folder / "emb" / "tokenizer_config.json").is_file():
            emb_tokenizer = AutoTokenizer.from_pretrained(folder / "emb")
        projection = folder / "projection.safetensors"
        weights = load_file(projection) if projection.is_file() else {}
    return Parts(gen, emb, tokenizer, emb_tokenizer, weights, settings)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turns what the libraries say of missing or damaged files into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(f"the model at {folder} is damaged ({reason}); copy it again, or export it again") from None


def read_settings(folder: Path) -> ModelSettings:
    """The settings of a model folder. Raises UserError if they are damaged or of a newer format."""
    file = folder / "cosup.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if raw["format_version"] > FORMAT_VERSION:
            raise UserError(
                f"{file} has format version {raw['format_version']}, newer than this cosup reads; upgrade cosup"
            )
        return ModelSettings.model_validate(raw)
    except KeyError as e:
        raise UserError(f"{file} is damaged: the key {e} is missing") from None
    except ValidationError as e:
        raise UserError(f"{file} is damaged: {_problem(e)}") from None
    except (TypeError, json.JSONDecodeError) as e:
        raise UserError(f"{file} is damaged: {str(e).splitlines()[0]}") from None


def _problem(error: ValidationError) -> str:
    """The first thing that is wrong with settings, in a sentence."""
    told = error.errors()[0]
    return f"{'.'.join(map(str, told['loc']))} is {told['input']!r}: {told['msg']}"


def retype(folder: Path, dtype: torch.dtype) -> None:
    """Rounds the weights of a model folder, in place."""
    for file in folder.rglob("*.safetensors"):
        weights = {name: w.to(dtype) if w.is_floating_point() else w for name, w in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text("utf-8")) | {"dtype": str(dtype).removeprefix("torch.")}
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    renew_fingerprint(folder)


def renew_fingerprint(folder: Path) -> None:
    """Writes into a model folder what its Emb_seq is known by, after a change of its weights."""
    settings = read_settings(folder)
    _rewrite(folder, settings.model_copy(update={"fingerprint": _fingerprint(folder, settings)}))


def set_answers(folder: Path, answers: Mapping[str, Any]) -> None:
    """Writes into a model folder how its answers are best written: some fields of `AnswerSettings`.

    Raises:
        UserError: a value out of range.
    """
    settings = read_settings(folder)
    try:
        wanted = AnswerSettings.model_validate(settings.answers.model_dump() | dict(answers))
    except ValidationError as e:
        raise UserError(_problem(e)) from None
    _rewrite(folder, settings.model_copy(update={"answers": wanted}))


def _rewrite(folder: Path, settings: ModelSettings) -> None:
    (folder / "cosup.json").write_text(settings.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _save_part(part: Any, tokenizer: Tokenizer, folder: Path, *, again: Tokenizer | None = None) -> None:
    """`again` is the tokenizer that the folder has already: an adapter, kept small, does without its own copy."""
    adapters.save(part, folder)
    if tokenizer is not again or not is_adapter_folder(folder):
        tokenizer.save_pretrained(folder)


def _load_part(folder: Path, kind: Any, dtype: torch.dtype, settings: ModelSettings, lora: LoraSection | None) -> Any:
    layers = settings.emb_layers if kind is AutoModel else None
    if not is_adapter_folder(folder):
        part = without_pooler(kind.from_pretrained(folder, dtype=dtype, use_safetensors=True))
        return part if lora is None else part.requires_grad_(False)
    if lora is None:
        return adapters.load_merged(folder, dtype=dtype, layers=layers, template=settings.template)
    return adapters.load_trainable(folder, lora, layers=layers, template=settings.template)


def _fingerprint(folder: Path, settings: ModelSettings) -> str:
    """SHA-256 over all that a passage's vector depends on: Emb_seq, projection, similarity and passage layout."""
    emb = folder / ("gen" if settings.emb_is_gen else "emb")
    files = (*sorted(emb.glob("*.safetensors")), emb / ADAPTER_CONFIG, folder / "projection.safetensors")
    weights = [sha256(file) for file in files if file.is_file()]
    template = settings.template
    layout = [settings.similarity, settings.pooling, template.passage, template.end_token, template.max_passage_tokens]
    return hashlib.sha256(json.dumps([weights, layout]).encode()).hexdigest()
