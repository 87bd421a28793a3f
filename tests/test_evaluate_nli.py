"""NLI judges that are real Hugging Face models: tiny ones that were taught a dozen judgements."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from cosup.config import UserError
from cosup.data import Question, write_records
from cosup.engine import Options
from cosup.evaluate import CachedNli, HuggingFaceNli, RunSettings, evaluate_tasks, read_tasks
from cosup.index import build_index
from cosup.model import CoSupModel

PLACES = ("Oslo", "Lima", "Paris", "Rome")
PAIRS = [
    (f"{premise} stands on a river, " + "and it rains there " * ((first + 2 * second) % 4), f"{hypothesis} stands.")
    for first, premise in enumerate(PLACES)
    for second, hypothesis in enumerate(PLACES)
]
TRUTH = [premise.split()[0] == hypothesis.split()[0] for premise, hypothesis in PAIRS]


def make_tokenizer(folder: Path, **options: Any) -> PreTrainedTokenizerFast:
    """Words, with [CLS] a [SEP] b [SEP] for pairs and an end for what is written."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = [text for pair in PAIRS for text in pair] + ["premise: hypothesis: 1 0"]
    tokenizer.train_from_iterator(words, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    start, end = ("[CLS]", 2), ("[SEP]", 3)
    single, pair = options.pop("layout")
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=[start, end])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]", **options
    )
    fast.save_pretrained(folder)
    return fast


def teach(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """Until it knows: how many steps that takes differs between machines and numbers of threads."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(1000):
        loss = model(**batch).loss
        if loss < 0.01:
            return
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError(f"it does not learn: the loss is still {loss:.3f}")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a classifier of pairs whose entailment label is neither first nor in lower case."""
    folder = tmp_path_factory.mktemp("classifier")
    inputs = ["input_ids", "attention_mask", "token_type_ids"]
    layout = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
    tokenizer = make_tokenizer(folder, layout=layout, model_input_names=inputs)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=24, id2label={0: "contradiction", 1: "neutral", 2: "ENTAILMENT"},
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    batch = tokenizer([p for p, _ in PAIRS], [h for _, h in PAIRS], padding=True, return_tensors="pt")
    teach(model, {**batch, "labels": torch.tensor([2 if true else 0 for true in TRUTH])})
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a T5 that writes 1 or 0, in the form that TRUE asks in."""
    folder = tmp_path_factory.mktemp("writer")
    tokenizer = make_tokenizer(folder, layout=("$A [SEP]", "$A [SEP] $B [SEP]"))
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=3,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    asked = [f"premise: {premise} hypothesis: {hypothesis}" for premise, hypothesis in PAIRS]
    batch = tokenizer(asked, padding=True, return_tensors="pt", return_token_type_ids=False)
    labels = tokenizer(["1" if true else "0" for true in TRUTH], return_tensors="pt").input_ids
    teach(model, {**batch, "labels": labels})
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=["classifier", "writer"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def test_both_kinds_say_what_they_were_taught_in_a_batch_as_one_by_one(folder: Path) -> None:
    nli = HuggingFaceNli(str(folder))
    assert nli.entails(PAIRS) == TRUTH
    assert [answer for pair in PAIRS for answer in nli.entails([pair])] == TRUTH


def test_no_file_of_theirs_is_a_pickle(folder: Path) -> None:
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    with pytest.raises(UserError, match="can't be loaded"):
        HuggingFaceNli(str(folder / "nowhere"))


def test_a_pickle_beside_the_configuration_is_not_loaded(classifier: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((classifier / name).read_bytes())
    torch.save({"weight": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        HuggingFaceNli(str(tmp_path))


def test_a_premise_that_is_too_long_is_cut_and_the_hypothesis_is_kept(classifier: Path) -> None:
    nli = HuggingFaceNli(str(classifier))
    endless = "Lima stands on a river, " + "and it rains there " * 50  # of which it reads as much as it was taught
    assert nli.entails([(endless, "Lima stands."), (endless, "Rome stands.")]) == [True, False]


def test_a_hypothesis_is_cut_only_where_it_alone_is_longer_than_what_is_read(
    classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nli, read = HuggingFaceNli(str(classifier)), []
    forward = nli._model.forward
    monkeypatch.setattr(nli._model, "forward", lambda **batch: read.append(batch["input_ids"]) or forward(**batch))
    premise = "Lima stands on a river, " + "and it rains there " * 9
    whole, endless = ("and it rains there " * times + "Lima stands." for times in (4, 9))  # 19 and 39 of 21 tokens
    pairs = [(premise, whole), (premise, endless), ("Lima", endless), ("", whole)]
    together = nli.entails(pairs)
    for ids in read:
        assert ids.shape[1] == 24
    words = nli._tokenizer.batch_decode(read[0])
    assert words[0].split()[:5] == ["[CLS]", "Lima", "stands", "[SEP]", "and"]
    assert all(row.replace(" [PAD]", "").endswith("there Lima stands . [SEP]") for row in words)
    assert together == [answer for pair in pairs for answer in nli.entails([pair])]


def test_a_pair_is_asked_once_also_in_the_next_run_and_after_a_kill(folder: Path, tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    class Counting(HuggingFaceNli):
        def entails(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
            asked.extend(pairs)
            return super().entails(pairs)

    nli = Counting(str(folder))
    first = CachedNli(nli, tmp_path)
    first.judge([*PAIRS, *PAIRS])
    assert sorted(asked) == sorted(PAIRS)
    assert [first.entails(pair) for pair in PAIRS] == TRUTH
    asked.clear()
    CachedNli(nli, tmp_path).judge(PAIRS)
    assert asked == []
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-5])  # as a kill leaves it
    CachedNli(nli, tmp_path).judge(PAIRS)
    assert len(asked) == 1
    asked.clear()
    again = CachedNli(nli, tmp_path)
    again.judge(PAIRS)
    assert asked == []
    assert [again.entails(pair) for pair in PAIRS] == TRUTH


def test_a_run_is_judged_by_such_a_model(
    tiny: CoSupModel, passages: list, questions: list[Question], classifier: Path, tmp_path: Path
) -> None:
    write_records(tmp_path / "mixed.jsonl", questions)
    tasks = read_tasks([str(tmp_path / "mixed.jsonl")])
    index = build_index(passages, tiny, tmp_path / "index")
    settings = RunSettings(options=Options(max_new_tokens=6, retrieve_first=True))
    nli = HuggingFaceNli(str(classifier))
    found = evaluate_tasks(tiny, index, tasks, tmp_path / "run", settings=settings, nli=nli)["mixed"]
    assert found.figures["citation_recall"].count == found.figures["citation_precision"].count == 4
    (file,) = (tmp_path / "run").glob("nli-*.jsonl")
    assert file.read_text().count("\n") > 0
