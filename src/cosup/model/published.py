"""The checkpoints that the paper's authors published, as a model folder."""

from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoModel, AutoModelForCausalLM, AutoTokenizer

from cosup.config import UserError
from cosup.model.core import CoSupModel
from cosup.model.folders import ModelSettings
from cosup.model.lms import hub_within_reach, quiet, without_pooler
from cosup.template import TemplateSettings, Tokenizer

PAD, CS, CE, RET = "<PAD>", "[Cs]", "[Ce]", "[Ret]"
"""The tokens that the authors added to Llama 2's 32,000, in this order."""

_CARD = """# {gen}

The generator {gen!r} and the {role} {emb!r}, published with *Semiparametric Token-Sequence Co-Supervision* (Lee et al.,
ACL 2024, arXiv 2403.09024), imported by `cosup import`: `gen/` writes and retrieves, `emb/` embeds passages.
"""


def import_published(gen: str, emb: str | None, *, out: Path, retriever: str | None = None) -> None:
    """Writes a model folder from published checkpoints, in the type that they are stored in.

    Vectors are read at a trailing `<PAD>`, compared by dot product, with temperature 1.

    Args:
        gen: the generator: a Hugging Face name or a local folder.
        emb: the passage encoder of a co-supervised pair, saved as a causal LM.
        out: the model folder to write.
        retriever: of `separate` training, in the place of `emb`: the one LM that encodes both sides.

    Raises:
        UserError: both or neither of `emb` and `retriever` are given, or one can't be found, lacks the added tokens or
            rows for them, or is of another size.
    """
    if (emb is None) == (retriever is None):
        raise UserError(
            "name the passage encoder of a co-supervised pair with --emb, or the one LM that encodes both sides with "
            f"--retriever; --emb is {emb!r} and --retriever {retriever!r}"
        )
    second = str(emb if retriever is None else retriever)
    generator, tokenizer = _open(gen, AutoModelForCausalLM)
    encoder, emb_tokenizer = _open(second, AutoModel)
    sizes = generator.config.hidden_size, encoder.config.hidden_size
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{gen} has hidden size {sizes[0]} and {second} {sizes[1]}: they are no pair; name two that are"
        )
    settings = ModelSettings(
        similarity="dot",
        temperature=1.0,
        pooling="last",
        retriever=retriever is not None,
        template=TemplateSettings(ret=RET, cs=CS, ce=CE, end_token=PAD),
    )
    model = CoSupModel(generator, encoder, tokenizer=tokenizer, emb_tokenizer=emb_tokenizer, settings=settings)
    role = "passage encoder" if retriever is None else "retriever"
    model.save(out, card=_CARD.format(gen=gen, role=role, emb=second))


def _open(name: str, kind: Any) -> tuple[Any, Tokenizer]:
    try:
        with quiet(), hub_within_reach():
            lm = without_pooler(kind.from_pretrained(name, dtype="auto", use_safetensors=True))
            tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(
            f"{name} can't be loaded ({reason}); name a folder that holds it, or its Hugging Face name"
        ) from None
    added, rows = tokenizer.get_added_vocab(), lm.get_input_embeddings().weight.shape[0]
    for token in (PAD, CS, CE, RET):
        if token not in added or added[token] >= rows:
            raise UserError(
                f"{name} has no token {token} with a row of its own in the embeddings, so it is none of the published "
                "checkpoints; name one of them"
            )
    # as special tokens, so that no text of users or documents is read as one
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in added], special_tokens=True)
    return lm, tokenizer
