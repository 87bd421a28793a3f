import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cosup.analyze import analyze_models, sequence_space, stages, token_space
from cosup.cli import app
from cosup.config import UserError, parse_recipe
from cosup.data import Evidence, Example, Passage, Question, write_records
from cosup.model import CoSupModel
from cosup.train import train_recipe


def test_a_model_compared_with_itself_has_not_moved(
    tiny_folder: Path, passages: list[Passage], questions: list[Question], tmp_path: Path
) -> None:
    found = analyze_models([tiny_folder, tiny_folder], passages, questions, tmp_path / "out", most=40)
    assert json.loads((tmp_path / "out" / "spaces.json").read_text()) == found
    assert (tmp_path / "out" / "spaces.png").read_bytes().startswith(b"\x89PNG")
    assert "## token space: since the model before" in (tmp_path / "out" / "spaces.md").read_text()
    for space in found["spaces"].values():
        assert space["shapes"][0] == space["shapes"][1]
        (move,) = space["moves"]
        assert move["drift"] == pytest.approx(0.0, abs=1e-6)
        assert move["overlap"] == 1.0
        assert move["stale_success"] == space["shapes"][1]["success"]


def test_the_checkpoints_of_a_run_are_looked_at_in_the_order_of_their_steps(
    tiny_lm: Path, passages: list[Passage], questions: list[Question], tmp_path: Path
) -> None:
    """Step 8 before step 10, which is not the order of their names; the last checkpoint is the finished model."""
    examples = [Example(f"e{i}", "squad", f"which {i}?", (Evidence(f"p{i}", "Oslo"),)) for i in range(8)]
    for name, records in (("passages", passages), ("examples", examples), ("questions", questions)):
        write_records(tmp_path / f"{name}.jsonl", records)
    data = {"folder": str(tmp_path), "train": ["examples.jsonl"], "passages": ["passages.jsonl"]}
    train = {"batch_size": 4, "max_steps": 10, "epochs": 99, "save_steps": 2, "learning_rate": 0.01}
    recipe = {"name": "tiny", "model": {"gen": str(tiny_lm), "lora": {"rank": 2}}, "data": data, "train": train}
    run = train_recipe(parse_recipe(recipe), tmp_path / "run")
    assert [path.name for path in stages([run / "checkpoints", run])] == ["checkpoint-8", "checkpoint-10", "run"]
    command = ["analyze", str(run / "checkpoints"), str(run), "--passages", str(tmp_path / "passages.jsonl")]
    rest = ["--questions", str(tmp_path / "questions.jsonl"), "--out", str(tmp_path / "out"), "--most", "40"]
    result = CliRunner().invoke(app, [*command, *rest])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "spaces.json").read_text())
    assert [Path(model).name for model in found["models"]] == ["checkpoint-8", "checkpoint-10", "run"]
    for space in found["spaces"].values():
        moved, still = space["moves"]
        assert moved["drift"] > 1e-5 > still["drift"]


def test_the_sequence_space_is_forced_retrieval(
    tiny: CoSupModel, passages: list[Passage], questions: list[Question]
) -> None:
    space = sequence_space(tiny, passages, questions)
    assert space.queries_QD.shape == (4, tiny.dim)
    assert [passages[row].id for row in space.targets_Q] == [question.gold[0] for question in questions]
    assert space.vectors_ND == pytest.approx(tiny.embed_passages(passages))


def test_a_token_state_stands_before_its_token(
    tiny: CoSupModel, passages: list[Passage], questions: list[Question]
) -> None:
    import numpy as np
    import torch

    space = token_space(tiny, passages, questions[:1], most=500, rng=np.random.default_rng(0))
    head_VD = tiny.gen.get_output_embeddings().weight.detach()
    own_D = torch.tensor(space.vectors_ND[space.targets_Q[0]], dtype=head_VD.dtype)
    assert any(torch.allclose(own_D, row_D, atol=1e-6) for row_D in head_VD)
    logits_NT = torch.tensor(space.queries_QD, dtype=head_VD.dtype) @ head_VD.T
    tokens = [int((head_VD - torch.tensor(space.vectors_ND[row])).abs().sum(1).argmin()) for row in space.targets_Q]
    nats = torch.nn.functional.cross_entropy(logits_NT, torch.tensor(tokens))
    from cosup.data.convert import convert
    from cosup.evaluate import ntp_loss

    by_id = {passage.id: passage for passage in passages}
    rendered = [tiny.template.render(example, by_id) for example in convert(questions[:1], passages=by_id)]
    assert float(nats) == pytest.approx(ntp_loss(tiny, rendered).value, rel=1e-4)


def test_too_few_questions_and_no_model_are_user_errors(tiny_folder: Path, passages: list[Passage], tmp_path: Path):
    with pytest.raises(UserError, match="there are 0 questions"):
        analyze_models([tiny_folder], passages, [Question("q", "nq", "?")], tmp_path / "out")
    with pytest.raises(UserError, match="at least one"):
        analyze_models([], passages, [], tmp_path / "out")
    assert not (tmp_path / "out").exists()
