"""Importing the paper's checkpoints, from tiny folders of their layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from cosup.cli import app
from cosup.config import UserError
from cosup.data import Passage
from cosup.model import CoSupModel, import_published

ADDED = ["<PAD>", "[Cs]", "[Ce]", "[Ret]"]


@pytest.fixture
def publish(tiny_lm: Path, tmp_path: Path) -> Any:
    """Writes a checkpoint as the authors did: a causal LM whose tokenizer has four tokens more."""

    def write(name: str, *, seed: int, added: list[str] = ADDED, hidden: int = 32, special: bool = False) -> str:
        tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
        tokenizer.add_tokens(added, special_tokens=special)
        torch.manual_seed(seed)
        config = LlamaConfig.from_pretrained(
            tiny_lm, vocab_size=len(tokenizer), tie_word_embeddings=False, hidden_size=hidden
        )
        LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return write


def state(folder: str, ids: list[int]) -> np.ndarray:
    """The last hidden state behind `ids`, by plain transformers."""
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        out = lm(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]
    return np.asarray(out)


@pytest.mark.parametrize("special", [False, True], ids=["plain tokens", "special tokens"])
def test_a_co_supervised_pair_gives_the_vectors_that_the_authors_read(
    publish: Any, tmp_path: Path, passages: list[Passage], special: bool
) -> None:
    gen, emb = publish("gen", seed=1, special=special), publish("emb", seed=2, special=special)
    import_published(gen, emb, out=tmp_path / "model")
    model = CoSupModel.load(tmp_path / "model", dtype="float64", device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(emb)
    for passage, vector in zip(passages, model.embed_passages(passages), strict=True):
        text = f"{passage.title} :: {passage.text}" if passage.title else passage.text
        ids = [*tokenizer(text).input_ids, tokenizer.get_added_vocab()["<PAD>"]]
        np.testing.assert_allclose(vector, state(emb, ids), atol=1e-5)
    t = model.template
    prompt = t.prompt("Where is Oslo?", task="squad")
    assert t.decode(prompt).endswith("## Input:\n\nWhere is Oslo?## Output:\n\n")
    np.testing.assert_allclose(model.query([prompt])[0], state(gen, [*prompt, t.ret]), atol=1e-5)
    assert (model.settings.similarity, model.settings.temperature, model.settings.retriever) == ("dot", 1.0, False)
    assert [t.tokenizer.get_added_vocab()[name] for name in ADDED] == [400, 401, 402, 403]


def test_a_separate_retriever_reads_prompts_and_passages_itself(
    publish: Any, tmp_path: Path, passages: list[Passage]
) -> None:
    gen, both = publish("gen", seed=1), publish("retriever", seed=2)
    import_published(gen, None, retriever=both, out=tmp_path / "model")
    model = CoSupModel.load(tmp_path / "model", dtype="float64", device="cpu")
    assert model.settings.retriever
    prompt = model.template.prompt("Where is Oslo?", task="squad")
    np.testing.assert_allclose(model.query([prompt])[0], state(both, [*prompt, model.template.ret]), atol=1e-5)


@pytest.mark.parametrize("special", [False, True], ids=["plain tokens", "special tokens"])
def test_text_never_becomes_one_of_the_added_tokens(publish: Any, tmp_path: Path, special: bool) -> None:
    gen, emb = publish("gen", seed=1, special=special), publish("emb", seed=2, special=special)
    import_published(gen, emb, out=tmp_path / "model")
    t = CoSupModel.load(tmp_path / "model", device="cpu").template
    hostile = "".join(ADDED)
    read = t.encode(hostile) + t.embedded(Passage("p", hostile), max_tokens=99)[:-1]
    assert not {400, 401, 402, 403} & set(read)
    assert t.decode(t.encode(hostile)) == hostile


def test_the_stored_type_is_kept(publish: Any, tmp_path: Path) -> None:
    import_published(publish("gen", seed=1), publish("emb", seed=2), out=tmp_path / "model")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model" / "gen", dtype="auto").dtype == torch.bfloat16


def test_what_is_no_published_pair_is_refused(publish: Any, tmp_path: Path) -> None:
    gen, out = publish("gen", seed=1), tmp_path / "model"
    with pytest.raises(UserError, match=r"has no token \[Ret\] with a row"):
        import_published(gen, publish("other", seed=2, added=ADDED[:3]), out=out)
    with pytest.raises(UserError, match=r"hidden size 32 and .* 16: they are no pair"):
        import_published(gen, publish("small", seed=2, hidden=16), out=out)
    with pytest.raises(UserError, match="--emb is None and --retriever None"):
        import_published(gen, None, out=out)
    with pytest.raises(UserError, match="can't be loaded"):
        import_published(gen, str(tmp_path / "nowhere"), out=out)
    assert not out.exists()


def test_the_command_imports_a_pair(publish: Any, tmp_path: Path) -> None:
    gen, emb, out = publish("gen", seed=1), publish("emb", seed=2), tmp_path / "model"
    result = CliRunner().invoke(app, ["import", "--gen", gen, "--emb", emb, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert (out / "cosup.json").is_file()
