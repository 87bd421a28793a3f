import pickle
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, GPT2Config, GPT2Model

from cosup.config import ModelSection
from cosup.data import Passage
from cosup.embedder import ContextQueries, ModelEmbedder, OpenModel
from cosup.index import MeasuringEmbedder, build_index
from cosup.model import CoSupModel


def test_tokens_are_counted_as_the_model_reads_them(tiny: CoSupModel, passages: list[Passage]) -> None:
    embedder = ModelEmbedder(tiny)
    odd = [*passages, Passage("odd", "[Ret] <eos> text", "ü")]
    read = [len(tiny.template.embedded(passage, max_tokens=1 << 20)) for passage in odd]
    assert embedder.count_tokens(odd) == read
    assert isinstance(embedder, MeasuringEmbedder)


def test_no_part_of_a_long_passage_is_shortened(tiny: CoSupModel, tmp_path: Path) -> None:
    text = " ".join(f"Iron number {i} is a metal." for i in range(200))
    index = build_index([Passage("long", text, "Iron")], ModelEmbedder(tiny), tmp_path / "index")
    assert len(index) > 1
    assert " ".join(passage.text for passage in index) == text
    assert not tiny.template.shortened


def test_a_passage_is_split_where_emb_seq_reads_less_than_gen(tiny_lm: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    tokenizer.save_pretrained(tmp_path / "emb")
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64)
    GPT2Model(config).save_pretrained(tmp_path / "emb")
    embedder = ModelEmbedder(CoSupModel.start(ModelSection(gen=str(tiny_lm), emb=str(tmp_path / "emb"))))
    assert embedder.max_tokens == 64
    text = " ".join(f"Iron number {i} is a metal." for i in range(40))
    index = build_index([Passage("long", text)], embedder, tmp_path / "index")
    assert " ".join(passage.text for passage in index) == text


def test_a_model_is_opened_anew_by_a_picklable_factory(tiny_folder: Path, passages: list[Passage]) -> None:
    factory = pickle.loads(pickle.dumps(OpenModel(tiny_folder)))
    embedder = factory(3)
    expected = CoSupModel.load(tiny_folder).embed_passages(passages)
    np.testing.assert_array_equal(embedder.embed_passages(passages), expected)
    assert embedder.layout["passage template"] == "{title} :: {text}"


def test_queries_are_the_states_at_ret_in_each_examples_own_context(tiny, passages, examples, tmp_path) -> None:
    index = build_index(passages, tiny, tmp_path / "index")
    found = ContextQueries(tiny, index)(examples)
    assert [len(states) for states in found] == [1, 2, 0]
    rendered = tiny.template.render(examples[1], {p.id: p for p in passages})
    context = rendered.ids[: rendered.ret[1]]
    assert rendered.ids[rendered.ret[1]] == tiny.template.ret
    np.testing.assert_allclose(found[1][1], tiny.query([context])[0], rtol=1e-5, atol=1e-6)
