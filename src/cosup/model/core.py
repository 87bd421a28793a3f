"""CoSupModel: Gen and Emb_seq with one projection between them.

Shapes: S packed tokens, L labelled tokens, D Gen hidden size, E Emb_seq hidden size, K retrieval positions,
N candidates, P passages, Q queries, T tokens.
"""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosup import losses
from cosup.config import ModelSection, UserError
from cosup.data import Passage
from cosup.model import adapters, folders
from cosup.model.folders import ModelSettings
from cosup.model.lms import (
    Dtype,
    add_control_rows,
    body_of,
    compute_dtype,
    context_of,
    is_adapter_folder,
    is_decoder,
    keep_freed_memory,
    keep_layers,
    load_body,
    load_lm,
    place_of,
    refuse_unsupported,
)
from cosup.model.packing import ATTENTION, Batch, batches_by_tokens, last_states, mean_states, packed
from cosup.template import Template, TemplateSettings, Tokenizer

_TOKENS_PER_BATCH = 4096  # of packed inference
_RIDGES = tuple(10.0**-n for n in range(2, 10))  # that are tried for a fitted projection


class Output(NamedTuple):
    """What the losses are made of: `ntp` summed and its number of tokens, queries [K, D] and candidates [N, D]."""

    ntp_sum: Tensor
    ntp_count: int
    queries_KD: Tensor
    candidates_ND: Tensor


class CoSupModel(nn.Module):
    """One generator and one passage encoder, trained together.

    Args:
        gen: a causal LM of transformers.
        emb: a decoder or encoder of transformers without a head; Gen's own body where the two share their weights.
        tokenizer: Gen's, with the control tokens.
        emb_tokenizer: Emb_seq's; the same object where they are the same.
        settings: see `ModelSettings`.

    Attributes:
        head_learns: whether the LM head as such gets a gradient; where it is tied, the embeddings still do.
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
        self.head_learns = True
        for part in (gen, emb):
            refuse_unsupported(part.config)
            _use_packed_attention(part)
        same = gen.config.hidden_size == emb.config.hidden_size
        self.projection = None if same else nn.Linear(emb.config.hidden_size, gen.config.hidden_size, bias=False)
        if self.settings.pooling == "auto":
            pooling = "last" if is_decoder(body_of(emb)) else "mean"
            self.settings = self.settings.model_copy(update={"pooling": pooling})

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
        """How many tokens Gen can read."""
        return context_of(self.gen.config)

    @property
    def passage_limit(self) -> int:
        """How many tokens Emb_seq reads of a passage."""
        return min(self.settings.template.max_passage_tokens, context_of(self.emb.config))

    def forward(self, batch: Batch) -> Output:
        """One pass over a step's sequences and passages, the only entry while training, for DDP and FSDP.

        Args:
            batch: see `Batch`; the parts that an objective does not need are absent and cost nothing.
        """
        states_SD = packed(body_of(self.gen), batch["gen_ids"], batch["gen_lengths"])
        ntp_sum, count = states_SD.new_zeros((), dtype=torch.float32), 0
        if "labels" in batch:
            states_LD = states_SD[batch["label_positions"]]
            ntp_sum, count = losses.ntp(states_LD, self._head, batch["labels"]), len(batch["labels"])
        if "emb_ids" not in batch:
            nothing = states_SD.new_zeros((0, self.dim))
            return Output(ntp_sum, count, nothing, nothing)
        if self.settings.retriever or "query_ids" in batch:
            asked = batch.get("query_ids", batch["gen_ids"]), batch.get("query_lengths", batch["gen_lengths"])
            states_SD = packed(body_of(self.emb), *asked)
        queries_KD = self.comparable(states_SD[batch["ret_positions"]])
        return Output(ntp_sum, count, queries_KD, self._embed_packed(batch["emb_ids"], batch["emb_lengths"]))

    def embed(self, ids_PT: Tensor, mask_PT: Tensor) -> Tensor:
        """Vectors of passages, as candidates and as an index holds them: projected, and normalised for cosine.

        Args:
            ids_PT: ids from `Template.embedded`, padded on either side.
            mask_PT: True at real tokens; each row has at least one.

        Returns:
            [P, D]; row p is Emb_seq's state at the last real token of passage p, or the mean over its real tokens.
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
        sequences = [self.template.embedded(passage, max_tokens=self.passage_limit) for passage in passages]
        for passage in passages:
            if passage.id in self.template.shortened:
                self._refuse_endless(passage)
        return self._in_batches(sequences, self._embed_packed)

    @torch.inference_mode()
    def query(self, prompts: Sequence[list[int]]) -> npt.NDArray[np.float32]:
        """Queries of `[Ret]` put right after each prompt: forced retrieval.

        Args:
            prompts: ids of each prompt.

        Returns:
            [Q, D] float32.
        """
        return self._in_batches([[*prompt, self.template.ret] for prompt in prompts], self._query_packed)

    @torch.no_grad()
    def fit_projection(self, contexts: Sequence[Sequence[int]], sequences: Sequence[Sequence[int]]) -> None:
        """Makes the projection the map under which passages are most like the queries that ask for them.

        An Emb_seq of another kind than Gen has its own space, which training alone finds only after long.

        Args:
            contexts: ids up to and with a `[Ret]`, one for each retrieval.
            sequences: ids of the passage that answers it, as Emb_seq reads it.
        """
        assert self.projection is not None
        queries_QD = self._in_batches(contexts, self._query_packed)
        vectors_QE = self._in_batches(sequences, self._pool_packed, dim=self.projection.in_features)
        fitted_DE = least_squares(torch.from_numpy(queries_QD), torch.from_numpy(vectors_QE))
        self.projection.weight.copy_(fitted_DE)

    @torch.inference_mode()
    def queries(self, states_QD: Tensor, contexts: Sequence[list[int]]) -> Tensor:
        """Queries of an engine that has read up to `[Ret]`.

        Args:
            states_QD: Gen's states at `[Ret]`.
            contexts: all ids up to and with that `[Ret]`; a separate retriever reads them again.

        Returns:
            [Q, D], to be compared with passage vectors by inner product.
        """
        if not self.settings.retriever:
            return self.comparable(states_QD)
        ids_S = torch.tensor([i for context in contexts for i in context], device=self.device)
        return self._query_packed(ids_S, [len(context) for context in contexts])

    def save(self, folder: Path, *, card: str = "", merge: bool = False) -> None:
        """Writes a model folder: Hugging Face folders, or PEFT adapters, and `cosup.json`; whole or not at all.

        Args:
            folder: where; one that is there is replaced.
            card: text of the model card.
            merge: whether adapters are merged into full weights; they can't be trained on as adapters afterwards.
        """
        if merge:
            self.gen, self.emb = (adapters.merged(part) for part in (self.gen, self.emb))
        self.settings = folders.write(self, folder, card=card)

    @classmethod
    def load(cls, folder: Path | str, *, dtype: Dtype = "auto", device: str | None = None) -> Self:
        """Opens a model folder, or the finished model of a run folder, for inference; adapters are merged.

        Args:
            folder: written by `save` or `cosup train`, or the released model's name.
            dtype: `auto` is bfloat16 where the hardware multiplies in it, else float32.
            device: `cuda` where there is one, else `cpu`.

        Raises:
            UserError: no model there, a newer format, a damaged `cosup.json`.
        """
        keep_freed_memory()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        torch_dtype = compute_dtype(dtype, device)
        model = cls._of_parts(folders.read(Path(folder), torch_dtype))
        return model.to(device=torch.device(device), dtype=torch_dtype).eval()

    @classmethod
    def start(
        cls,
        section: ModelSection,
        *,
        seed: int = 0,
        template: TemplateSettings | None = None,
        retriever: bool = False,
    ) -> Self:
        """The model that a recipe starts from, in float32: pretrained LMs with new rows for the control tokens.

        Where `section.gen` names a model folder of adapters, and `section.lora` is given, these adapters go on.

        Args:
            section: the recipe's `model`.
            seed: of what is initialised.
            template: the layout of text; adapters that go on keep theirs, and refuse another `max_passage_tokens`.
            retriever: whether Emb_seq encodes both sides, as `separate` training asks.
        """
        keep_freed_memory()
        if goes_on(section):
            return cls._going_on(section, template, retriever=retriever)
        template = template or TemplateSettings()
        gen, tokenizer = load_lm(section.gen)
        torch.manual_seed(seed)
        add_control_rows(gen, tokenizer, template)
        emb, emb_tokenizer = _start_emb(section, gen, tokenizer)
        if retriever and section.emb is not None:
            raise UserError(
                f"train.objective separate trains one LM for both sides, a copy of Gen, so model.emb can't be "
                f"{section.emb!r}: leave it out"
            )
        settings = ModelSettings.of(section, template, retriever=retriever)
        if section.lora is not None:
            control = Template(tokenizer, settings=template)
            gen, emb = adapters.adapted(section, gen, emb, rows=[control.ret, control.cs, control.ce])
        model = cls(gen, emb, tokenizer=tokenizer, emb_tokenizer=emb_tokenizer, settings=settings)
        if model.projection is not None:  # passages start as alike as Emb_seq has them
            nn.init.orthogonal_(model.projection.weight)
        return model

    @classmethod
    def _going_on(cls, section: ModelSection, template: TemplateSettings | None, *, retriever: bool) -> Self:
        parts = folders.read(Path(section.gen), torch.float32, lora=section.lora)
        saved, limit = parts.settings, parts.settings.template.max_passage_tokens
        for key, wanted, found in (
            ("model.emb", section.emb or section.gen, "gen" if saved.emb_is_gen else section.gen),
            ("model.emb_layers", section.emb_layers or saved.emb_layers, saved.emb_layers),
            ("model.pooling", saved.pooling if section.pooling == "auto" else section.pooling, saved.pooling),
            ("data.max_passage_tokens", template.max_passage_tokens if template else limit, limit),
            ("a separate retriever", retriever, saved.retriever),
        ):
            if wanted != found:
                raise UserError(f"{section.gen} goes on as it is, with {key} {found!r} and not {wanted!r}: change that")
        settings = saved.model_copy(update={"similarity": section.similarity, "temperature": section.temperature})
        return cls._of_parts(parts._replace(settings=settings)).float()

    @classmethod
    def _of_parts(cls, parts: folders.Parts) -> Self:
        model = cls(
            parts.gen, parts.emb, tokenizer=parts.tokenizer, emb_tokenizer=parts.emb_tokenizer, settings=parts.settings
        )
        if model.projection is not None:
            model.projection.load_state_dict(parts.projection)
        return model

    def _head(self, states_LD: Tensor) -> Tensor:
        head = self.gen.get_output_embeddings()
        if self.head_learns:
            logits_LV: Tensor = head(states_LD)
            return logits_LV
        bias = None if getattr(head, "bias", None) is None else head.bias.detach()
        return F.linear(states_LD, head.weight.detach(), bias)

    def _embed_packed(self, ids_S: Tensor, lengths: list[int]) -> Tensor:
        vectors_NE = self._pool_packed(ids_S, lengths)
        return self.comparable(vectors_NE if self.projection is None else self.projection(vectors_NE))

    def _pool_packed(self, ids_S: Tensor, lengths: list[int]) -> Tensor:
        states_SE = packed(body_of(self.emb), ids_S, lengths)
        return (mean_states if self.settings.pooling == "mean" else last_states)(states_SE, lengths)

    def _query_packed(self, ids_S: Tensor, lengths: list[int]) -> Tensor:
        body = body_of(self.emb if self.settings.retriever else self.gen)
        return self.comparable(last_states(packed(body, ids_S, lengths), lengths))

    def _in_batches(
        self,
        sequences: Sequence[Sequence[int]],
        run: Callable[[Tensor, list[int]], Tensor],
        *,
        dim: int | None = None,
    ) -> npt.NDArray[np.float32]:
        """Runs packed batches of about equal cost; the longest sequences come first, so that memory fails at once."""
        out_PD = np.empty((len(sequences), dim or self.dim), np.float32)
        for rows in batches_by_tokens([len(s) for s in sequences], _TOKENS_PER_BATCH):
            ids_S = torch.tensor([i for row in rows for i in sequences[row]], device=self.device)
            out_PD[rows] = run(ids_S, [len(sequences[row]) for row in rows]).float().cpu().numpy()
        return out_PD

    def _refuse_endless(self, passage: Passage) -> None:
        length = len(self.template.encode(self.template.passage_text(passage)))
        context = min(context_of(self.gen.config), context_of(self.emb.config))
        if length > context:
            raise UserError(
                f"passage {passage.id!r} has {length:,} tokens, and the model reads at most {context:,}: "
                "split it, for instance with `cosup ingest`"
            )

    def comparable(self, x: Tensor) -> Tensor:
        """States or vectors [.., D] as they are scored by inner product: normalised for cosine."""
        return F.normalize(losses.accurate(x), dim=-1) if self.settings.similarity == "cosine" else x


def goes_on(section: ModelSection) -> bool:
    """Whether a recipe's `model` names adapters that go on being trained, with the Emb_seq that they know."""
    return section.lora is not None and is_adapter_folder(place_of(section.gen, "gen"))


def least_squares(queries_QD: Tensor, vectors_QE: Tensor) -> Tensor:
    """The projection [D, E] under which vectors are most like the queries they belong to.

    It is the linear map that tells vectors of one length from queries, turned round, and given the size of an
    orthogonal one. A ridge keeps it from noise: the one that tells best the tenth of them that is held out.
    """
    queries_QD, vectors_QE = queries_QD.double(), F.normalize(vectors_QE.double(), dim=-1)
    held_out = len(queries_QD) // 10

    def missed(ridge: float) -> float:
        told_DE = _ridge(queries_QD[held_out:], vectors_QE[held_out:], ridge)
        return float((queries_QD[:held_out] @ told_DE - vectors_QE[:held_out]).square().sum())

    fitted_DE = _ridge(queries_QD, vectors_QE, min(_RIDGES, key=missed))
    return F.normalize(fitted_DE.flatten(), dim=0).view_as(fitted_DE) * math.sqrt(min(fitted_DE.shape))


def _ridge(x_QD: Tensor, y_QE: Tensor, ridge: float) -> Tensor:
    """The map [D, E] from x to y of ridge regression; the ridge is a share of all variance."""
    gram_DD = x_QD.T @ x_QD
    told_DE: Tensor = torch.linalg.solve(gram_DD + ridge * gram_DD.trace() * torch.eye(len(gram_DD)), x_QD.T @ y_QE)
    return told_DE


def _start_emb(section: ModelSection, gen: Any, tokenizer: Tokenizer) -> tuple[Any, Tokenizer]:
    if section.emb == "gen":
        return body_of(gen), tokenizer
    emb, emb_tokenizer = (copy.deepcopy(body_of(gen)), tokenizer) if section.emb is None else load_body(section.emb)
    if section.emb_layers is not None:
        keep_layers(emb, section.emb_layers)
    return emb, emb_tokenizer


def _use_packed_attention(part: Any) -> None:
    inner = part.get_base_model() if hasattr(part, "get_base_model") else part
    try:
        inner.set_attn_implementation(ATTENTION)
    except ValueError:
        raise UserError(
            f"models of type {inner.config.model_type!r} have an attention of their own, which can't be packed; "
            "name another model"
        ) from None
