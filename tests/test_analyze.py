import json
from pathlib import Path

import pytest

from cosup.analyze import analyze_models, sequence_space, token_space
from cosup.config import UserError
from cosup.data import Passage, Question
from cosup.model import CoSupModel


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
