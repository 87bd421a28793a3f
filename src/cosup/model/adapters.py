"""LoRA on Gen and Emb_seq, by peft: put on, saved small, merged when a model is opened for inference."""

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cosup.config import LoraSection, ModelSection, UserError
from cosup.model.lms import ADAPTER_CONFIG, add_control_rows, is_tied, keep_layers, lasting_name, load_body, load_lm
from cosup.template import TemplateSettings


def adapted(section: ModelSection, gen: Any, emb: Any, *, rows: list[int]) -> tuple[Any, Any]:
    """Gen and Emb_seq with the adapters that a recipe asks for; what has none is not trained.

    The rows of the control tokens are trained with Gen's adapter, and saved with it: nothing else of the embeddings is.

    Args:
        section: the recipe's `model`, with `lora`.
        gen: with rows for the control tokens.
        emb: a body, Gen's own where they are shared.
        rows: ids of the control tokens.
    """
    assert section.lora is not None
    shared = section.emb == "gen"
    if "gen" in section.lora.on:
        gen = _adapt(gen, section.lora, base=lasting_name(section.gen, part="gen"), task="CAUSAL_LM", rows=rows)
    elif shared:
        raise UserError("model.lora.on leaves out gen, whose weights model.emb: gen shares; name gen there")
    if shared:
        return gen, gen.get_base_model().base_model
    if "emb" in section.lora.on:
        # only a copy of Gen has these rows, and only a separate retriever reads them
        own = rows if section.emb is None else None
        base = lasting_name(section.emb, part="emb") if section.emb else lasting_name(section.gen, part="gen")
        emb = _adapt(emb, section.lora, base=base, task="FEATURE_EXTRACTION", rows=own)
    return gen, emb


def merged(part: Any) -> Any:
    """The part with its adapter merged into full weights; itself where it has none."""
    return part.merge_and_unload() if hasattr(part, "merge_and_unload") else part


def save(part: Any, folder: Path) -> None:
    """Writes a part as a Hugging Face folder; of one with an adapter only that, and the rows trained with it."""
    if not hasattr(part, "peft_config"):
        part.save_pretrained(folder)
        return
    with _quiet():
        # by itself, peft saves the whole embeddings where they have more rows than those of the base
        part.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # a form that nobody filled in
    config = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    if isinstance(config["target_modules"], list):  # a set, whose order differs from process to process
        config["target_modules"].sort()
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def base_of(folder: Path) -> str:
    """The name of the model that an adapter lies on."""
    return str(json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))["base_model_name_or_path"])


def load_merged(folder: Path, *, dtype: torch.dtype, layers: int | None, template: TemplateSettings) -> Any:
    """The base that an adapter names, with the adapter merged.

    Args:
        folder: of the adapter.
        dtype: of the weights.
        layers: how many layers of the base Emb_seq keeps; None: all.
        template: names the control tokens.

    Raises:
        UserError: the base can't be found.
    """
    return _load(folder, layers=layers, template=template).merge_and_unload().to(dtype)


def load_trainable(folder: Path, lora: LoraSection, *, layers: int | None, template: TemplateSettings) -> Any:
    """The base that an adapter names, in float32, with the adapter on it, to go on training it.

    Args:
        folder: of the adapter.
        lora: the recipe's `model.lora`, which must say what the adapter is.
        layers: as for `load_merged`.
        template: as for `load_merged`.

    Raises:
        UserError: the base can't be found, or the adapter is another than `lora` says.
    """
    config = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    for key, wanted, found in (
        ("rank", lora.rank, config["r"]),
        ("alpha", lora.alpha, config["lora_alpha"]),
        ("dropout", lora.dropout, config["lora_dropout"]),
    ):
        if wanted != found:
            raise UserError(
                f"model.lora.{key} is {wanted:g}, and the adapters at {folder} have {found:g}: say the same"
            )
    part = _load(folder, layers=layers, template=template, trainable=True)
    _refuse_other_targets(part, lora, folder)
    part.peft_config["default"].base_model_name_or_path = config["base_model_name_or_path"]
    return part


def _refuse_other_targets(part: Any, lora: LoraSection, folder: Path) -> None:
    """By the matrices that are meant: peft names them in full, or by their last name."""
    names, ends = [name for name, _ in part.get_base_model().named_modules()], tuple(f".{t}" for t in lora.targets)
    found = set(part.base_model.targeted_module_names)
    if lora.targets and found != {name for name in names if f".{name}".endswith(ends)}:
        have = ", ".join(sorted({name.rpartition(".")[2] for name in found}))
        raise UserError(
            f"model.lora.targets is {', '.join(lora.targets)}, and the adapters at {folder} have {have}: leave it out"
        )


def _load(folder: Path, *, layers: int | None, template: TemplateSettings, trainable: bool = False) -> Any:
    import peft  # takes a second, which models without adapters are spared

    config = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    causal = config["task_type"] == "CAUSAL_LM"
    base, base_tokenizer = (load_lm if causal else load_body)(config["base_model_name_or_path"])
    if config.get("trainable_token_indices"):
        add_control_rows(base, base_tokenizer, template)
    if layers is not None:
        keep_layers(base, layers)
    with _quiet():
        return peft.PeftModel.from_pretrained(base, str(folder), is_trainable=trainable)


def _adapt(part: Any, lora: LoraSection, *, base: str, task: str, rows: list[int] | None) -> Any:
    import peft

    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a fraction will do
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) if lora.targets else "all-linear",
        trainable_token_indices=None if rows is None else _rows_by_layer(part, rows),
        task_type=task,
    )
    try:
        with _quiet():
            wrapped = peft.get_peft_model(part, config)
    except ValueError as e:
        raise UserError(f"model.lora can't be put on {base!r}: {' '.join(str(e).split())}") from None
    wrapped.peft_config["default"].base_model_name_or_path = base
    return wrapped


def _rows_by_layer(part: Any, rows: list[int]) -> dict[str, list[int]]:
    """The rows to train of the embeddings, and of the head where it is a matrix of its own."""
    layers = [part.get_input_embeddings()]
    if not is_tied(part) and part.get_output_embeddings() is not None:
        layers.append(part.get_output_embeddings())
    names = {id(module): name for name, module in part.named_modules()}
    return {names[id(layer)]: rows for layer in layers}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without peft's warnings: about what we do on purpose, and about its own use of transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
