import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import Interrupt, StoppedError, corpus, recipe, rows_of, with_train

from cosup.config import Recipe, TrainSection, UserError, parse_recipe
from cosup.data import Example, Passage
from cosup.engine import Engine, Options
from cosup.index import build_index
from cosup.model import CoSupModel, chunks, tokens_of
from cosup.model.lms import body_of
from cosup.model.packing import packed
from cosup.train import collate, start_model, train_recipe

__all__ = ["corpus", "recipe"]  # fixtures


def weights(folder: Path) -> dict:
    return {part: load_file(folder / part / "model.safetensors") for part in ("gen", "emb")}


def moved(recipe: Recipe, run: Path) -> set[str]:
    """Which of Gen's embeddings, Gen's layers and Emb_seq a run changed."""
    start_model(recipe).save(run.parent / f"{run.name}-start")
    train_recipe(recipe, run)
    before, after = weights(run.parent / f"{run.name}-start"), weights(run / "model")
    changed = {
        (part, "embeddings" if "embed" in name else "body")
        for part in before
        for name, weight in before[part].items()
        if not weight.equal(after[part][name])
    }
    return {f"{part} {what}" for part, what in changed}


EVERYTHING = {"gen embeddings", "gen body", "emb embeddings", "emb body"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, EVERYTHING),
        ({"objective": "ntp"}, {"gen embeddings", "gen body"}),
        ({"objective": "nsp"}, EVERYTHING),
        ({"freeze": ["emb"]}, {"gen embeddings", "gen body"}),
        ({"freeze": ["gen"]}, {"emb embeddings", "emb body"}),
        ({"freeze": ["embeddings"]}, {"gen body", "emb embeddings", "emb body"}),
        ({"objective": "separate"}, EVERYTHING),
    ],
)
def test_what_is_frozen_or_not_asked_for_does_not_move(
    recipe: dict, tmp_path: Path, changes: dict, expected: set[str]
) -> None:
    assert moved(with_train(recipe, **changes, max_steps=2), tmp_path / "run") == expected


def test_a_frozen_head_that_is_tied_gives_no_gradient_but_the_embeddings_learn(
    recipe: dict, passages: list[Passage], examples: list[Example]
) -> None:
    settings = with_train(recipe, freeze=["lm_head"])
    model = start_model(settings)
    batch = collate(model.template, examples, {p.id: p for p in passages}, TrainSection(objective="ntp"))
    model(batch).ntp_sum.backward()
    gradient = model.gen.get_input_embeddings().weight.grad
    assert gradient is not None
    moved = set(gradient.abs().sum(1).nonzero().flatten().tolist())
    read = set(batch["gen_ids"].tolist())
    assert moved
    assert moved <= read < set(range(len(gradient)))  # a head that learnt would move every row


def test_freezing_everything_or_what_is_not_there_is_told(recipe: dict, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="nothing is left to train"):
        start_model(with_train(recipe, freeze=["gen", "emb"]))
    with caplog.at_level(logging.WARNING):
        start_model(with_train(recipe, freeze=["projection"]))
    assert "need none" in caplog.text


def test_separate_training_gives_gen_the_gradient_of_ntp_alone(recipe: dict, tmp_path: Path) -> None:
    """Adam and clipping over each model apart: Gen ends as it would have without the retriever."""
    alone = train_recipe(with_train(recipe, objective="ntp", max_steps=3), tmp_path / "ntp")
    both = train_recipe(with_train(recipe, objective="separate", max_steps=3), tmp_path / "separate")
    first, second = weights(alone / "model")["gen"], weights(both / "model")["gen"]
    assert all(weight.equal(second[name]) for name, weight in first.items())
    assert "nsp" in rows_of(both)[0]


def test_a_model_with_a_separate_retriever_queries_with_it_and_answers(
    recipe: dict, tmp_path: Path, passages: list[Passage]
) -> None:
    run = train_recipe(with_train(recipe, objective="separate"), tmp_path / "run")
    model = CoSupModel.load(run, dtype="float64", device="cpu")
    prompt = model.template.prompt("gold?", task="squad")
    before = model.query([prompt])
    model.gen.model.layers[0].mlp.up_proj.weight.data.zero_()
    assert (model.query([prompt]) == before).all()  # Gen has no part in it
    index = build_index(passages, model, tmp_path / "index")
    forced = Options(retrieve_first=True, max_new_tokens=8, candidates=3)
    (response,) = Engine(model, index, forced).generate([prompt])
    nearest = [hit.id for hit in index.search(before, 3)[0]]
    retrieved = response.retrieved[0]
    assert [getattr(hit, "id", hit) for hit in retrieved] == nearest


def test_a_separate_retriever_reads_each_sequence_up_to_its_last_query(
    recipe: dict, passages: list[Passage], examples: list[Example]
) -> None:
    model = start_model(with_train(recipe, objective="separate")).double()
    both, separate = (
        collate(model.template, examples, {p.id: p for p in passages}, TrainSection(objective=objective))
        for objective in ("ntp+nsp", "separate")
    )
    whole_SD = packed(body_of(model.emb), both["gen_ids"], both["gen_lengths"])
    queries_KD = model(separate).queries_KD
    torch.testing.assert_close(queries_KD, model.comparable(whole_SD[both["ret_positions"]]))
    assert separate["gen_lengths"] == both["gen_lengths"]
    assert sum(separate["query_lengths"]) < sum(both["gen_lengths"])
    assert separate["query_lengths"][-1] == 1  # of an example that retrieves nothing
    assert tokens_of(separate) == tokens_of(both) + sum(separate["query_lengths"])
    parts = chunks(separate, 2, count=2)
    torch.testing.assert_close(torch.cat([model(part).queries_KD for part in parts]), queries_KD)


def test_separate_training_with_another_emb_seq_is_refused(recipe: dict, tiny_lm: Path) -> None:
    raw = {**recipe, "model": {"gen": str(tiny_lm), "emb": str(tiny_lm)}}
    with pytest.raises(UserError, match="one LM for both sides"):
        start_model(with_train(raw, objective="separate"))


def test_shared_weights_train_and_are_saved_once(recipe: dict, tiny_lm: Path, tmp_path: Path) -> None:
    raw = parse_recipe({**recipe, "model": {"gen": str(tiny_lm), "emb": "gen"}})
    run = train_recipe(raw, tmp_path / "run")
    assert not (run / "model" / "emb").exists()
    model = CoSupModel.load(run, dtype="float32", device="cpu")
    assert model.emb is model.gen.base_model
    assert model.embed_passages([Passage("a", "gold")]).shape == (1, 32)


def judged(recipe: dict) -> Recipe:
    """A run with a dev set, whose rate ruins the model after a good start."""
    raw = {**recipe, "data": recipe["data"] | {"dev": ["examples.jsonl"]}}
    return with_train(raw, max_steps=8, eval_steps=2, schedule="constant", learning_rate=2)


def assert_the_best_is_kept(run: Path) -> None:
    rows = [row for row in rows_of(run) if "eval_loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert {"eval_ntp", "eval_nsp", "eval_accuracy"} <= set(rows[0])
    best = min(rows, key=lambda row: row["eval_loss"])["step"]
    assert best < 8  # or the last weights would pass
    kept = load_file(run / "checkpoints" / f"checkpoint-{best}" / "model.safetensors")
    final = load_file(run / "model" / "emb" / "model.safetensors")
    assert final["norm.weight"].equal(kept["emb.norm.weight"])


def test_a_dev_set_is_judged_during_training_and_the_best_model_is_kept(recipe: dict, tmp_path: Path) -> None:
    assert_the_best_is_kept(train_recipe(judged(recipe), tmp_path / "r"))


def test_the_best_model_is_kept_where_the_run_was_interrupted_after_it(recipe: dict, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        train_recipe(judged(recipe), tmp_path / "r", callbacks=[Interrupt(7)])
    assert_the_best_is_kept(train_recipe(judged(recipe), tmp_path / "r"))
    shutil.rmtree(tmp_path / "r" / "model")  # as a run that was killed after its last checkpoint leaves it
    assert_the_best_is_kept(train_recipe(judged(recipe), tmp_path / "r"))
