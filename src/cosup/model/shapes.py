"""Models of a recipe's shapes with random weights, or with none: to count, to time, to validate without a download."""

import copy
import json
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from cosup.config import ModelSection, UserError
from cosup.model import adapters
from cosup.model.core import CoSupModel
from cosup.model.folders import ModelSettings, read_settings
from cosup.model.lms import body_of, hub_within_reach, is_adapter_folder, place_of, quiet, without_pooler
from cosup.template import TemplateSettings

_END = 0  # stands for the end token of the tokenizers that are not here


def config_of(name: str, *, part: str) -> Any:
    """The configuration of a model, without its weights.

    Args:
        name: as a recipe names it.
        part: `gen` or `emb`, where it is a model folder of cosup.

    Raises:
        UserError: it can't be read, and is none of the public models whose shapes cosup knows.
    """
    place = place_of(name, part)
    if is_adapter_folder(place):
        raise UserError(
            f"{name} holds adapters, whose base is not looked up here; merge them with `cosup export --merge`"
        )
    known = json.loads(files("cosup.model").joinpath("shapes.json").read_text("utf-8"))
    if name in known:
        sizes = dict(known[name])
        return AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    try:
        with quiet(), hub_within_reach():
            return AutoConfig.from_pretrained(place if place.is_dir() else name)
    except (OSError, ValueError) as e:
        raise UserError(
            f"the configuration of {name!r} can't be read ({str(e).strip().splitlines()[0]}), and it is none of the "
            f"models whose shapes are known: {', '.join(known)}"
        ) from None


def sketch(
    section: ModelSection,
    *,
    layers: int | None = None,
    device: str = "meta",
    template: TemplateSettings | None = None,
    retriever: bool = False,
) -> CoSupModel:
    """A model as `CoSupModel.start` makes it, but of random weights, and without tokenizers: it reads ids, no text.

    Args:
        section: the recipe's `model`.
        layers: cut both models after so many layers; None: all of them.
        device: `meta` has shapes and no weights, and costs nothing.
        template: the layout of text.
        retriever: as for `CoSupModel.start`.

    Raises:
        UserError: a configuration can't be read.
    """
    section = _on_bases(section)
    config = _sized(config_of(section.gen, part="gen"), layers)
    template = template or TemplateSettings()
    rows = [config.vocab_size + i for i in range(3)]
    config.vocab_size += 3
    with torch.device(device), quiet():
        gen = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        emb = body_of(gen)
        if section.emb != "gen":
            own = config if section.emb is None else config_of(section.emb, part="emb")
            depth = min((n for n in (layers, section.emb_layers) if n is not None), default=None)
            emb = without_pooler(AutoModel.from_config(_sized(own, depth), dtype=torch.float32))
        if section.lora is not None:
            gen, emb = adapters.adapted(section, gen, emb, rows=rows)
        settings = ModelSettings.of(section, template.model_copy(update={"end_token": None}), retriever=retriever)
        names = dict(zip((template.ret, template.cs, template.ce), rows, strict=True))
        tokenizer = _IdsOnly(names)
        return CoSupModel(gen, emb, tokenizer=tokenizer, emb_tokenizer=tokenizer, settings=settings)


def _on_bases(section: ModelSection) -> ModelSection:
    """The section that names what adapters lie on, where it names a model folder of adapters to go on with."""
    gen = place_of(section.gen, "gen")
    if not is_adapter_folder(gen):
        return section
    settings, emb = read_settings(gen.parent), gen.parent / "emb"
    names = [adapters.base_of(part) if is_adapter_folder(part) else str(part) for part in (gen, emb)]
    own = "gen" if settings.emb_is_gen else names[1] if names[1] != names[0] else None
    return section.model_copy(update={"gen": names[0], "emb": own, "emb_layers": settings.emb_layers})


class _IdsOnly:
    """What a template needs of a tokenizer where there is no text to read."""

    eos_token_id = _END

    def __init__(self, control: dict[str, int]):
        self._control = control

    def get_added_vocab(self) -> dict[str, int]:
        return self._control

    def __call__(self, text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=[_END])


def _sized(config: Any, layers: int | None) -> Any:
    """The configuration, of at most `layers` layers."""
    config = copy.deepcopy(config)
    if layers is not None:
        config.num_hidden_layers = min(layers, config.num_hidden_layers)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config
