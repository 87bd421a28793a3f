"""LoRA on Gen and Emb_seq, by peft: put on, saved small, merged when a model is opened for inference."""

import json
from pathlib import Path
from typing import Any

import torch

from cosup.config import LoraSection, ModelSection, UserError
from cosup.model.lms import add_control_rows, keep_layers, load_body, load_lm
from cosup.template import Template, TemplateSettings, Tokenizer


def adapted(section: ModelSection, gen: Any, emb: Any, *, template: Template) -> tuple[Any, Any]:
    """Gen and Emb_seq with the adapters that a recipe asks for; what has none is not trained.

    The rows of the control tokens are trained with Gen's adapter, and saved with it: nothing else of the embeddings is.

    Args:
        section: the recipe's `model`, with `lora`.
        gen: with rows for the control tokens.
        emb: a body, Gen's own where they are shared.
        template: knows the control tokens.
    """
    assert section.lora is not None
    rows = [template.ret, template.cs, template.ce]
    shared = section.emb == "gen"
    if "gen" in section.lora.on:
        gen = _adapt(gen, section.lora, base=section.gen, task="CAUSAL_LM", rows=rows)
    elif shared:
        raise UserError("model.lora.on leaves out gen, whose weights model.emb: gen shares; name gen there")
    if shared:
        return gen, gen.get_base_model().base_model
    if "emb" in section.lora.on:
        # only a copy of Gen has these rows, and only a separate retriever reads them
        own = rows if section.emb is None else None
        base = section.emb or section.gen
        emb = _adapt(emb, section.lora, base=base, task="FEATURE_EXTRACTION", rows=own)
    return gen, emb


def merged(part: Any) -> Any:
    """The part with its adapter merged into full weights; itself where it has none."""
    return part.merge_and_unload() if hasattr(part, "merge_and_unload") else part


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / "adapter_config.json").is_file()


def load_merged(
    folder: Path, tokenizer: Tokenizer, *, dtype: torch.dtype, layers: int | None, template: TemplateSettings
) -> Any:
    """The base that an adapter names, with the adapter merged.

    Args:
        folder: of the adapter.
        tokenizer: saved beside it.
        dtype: of the weights.
        layers: how many layers of the base Emb_seq keeps; None: all.
        template: names the control tokens.

    Raises:
        UserError: the base can't be found.
    """
    peft = _peft()
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    name = config["base_model_name_or_path"]
    causal = config["task_type"] == "CAUSAL_LM"
    base, base_tokenizer = (load_lm if causal else load_body)(name)
    if config.get("trainable_token_indices"):
        add_control_rows(base, base_tokenizer, template)
    if layers is not None:
        keep_layers(base, layers)
    return peft.PeftModel.from_pretrained(base, str(folder)).merge_and_unload().to(dtype)


def _adapt(part: Any, lora: LoraSection, *, base: str, task: str, rows: list[int] | None) -> Any:
    peft = _peft()
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) if lora.targets else "all-linear",
        trainable_token_indices=rows,
        task_type=task,
    )
    wrapped = peft.get_peft_model(part, config)
    wrapped.peft_config["default"].base_model_name_or_path = base
    return wrapped


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UserError("model.lora needs the package peft: run `pip install 'cosup[lora]'`") from None
    return peft
