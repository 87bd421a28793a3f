"""Fakes: a tiny random Llama with a real tokenizer, and a few passages, questions and examples."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

from cosup.config import LoraSection, ModelSection
from cosup.data import Evidence, Example, Passage, Question, Text
from cosup.files import cache_folder
from cosup.model import CoSupModel

# loading bars would only clutter a failure's output
transformers.utils.logging.disable_progress_bar()

WORDS = """Oslo is the capital of Norway. Paris is the capital of France. The krone is the money of Norway.
Answer the question.## Input: Which city is the seat of government?## Output: true or false, supports, refutes.
Iron is a metal with the symbol Fe; its atomic number is 26, and gold has 79. Hello, world! title :: text [SEP]"""


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept in the user's cache folder goes to a temporary one, in which models from packages still are."""
    folder, real = tmp_path_factory.mktemp("cache"), cache_folder()
    (folder / "cosup").mkdir()
    for model in real.glob("*/config.json"):
        (folder / "cosup" / model.parent.name).symlink_to(model.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random two-layer Llama (hidden size 32) with a byte-level BPE tokenizer of 400 tokens."""
    folder = tmp_path_factory.mktemp("tiny-lm")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_stranger(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random one-layer Llama of hidden size 16, of which only an Emb_seq with a projection is made."""
    folder = tmp_path_factory.mktemp("tiny-stranger")
    config = LlamaConfig.from_pretrained(tiny_lm, hidden_size=16, num_hidden_layers=1)
    LlamaModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tiny_lm).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def _tiny_model(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    CoSupModel.start(ModelSection(gen=str(tiny_lm))).save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_adapters(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of adapters on the tiny model; not to be changed. It stands for the released one."""
    folder = tmp_path_factory.mktemp("tiny-adapters") / "model"
    CoSupModel.start(ModelSection(gen=str(tiny_lm), lora=LoraSection(rank=16, alpha=32))).save(folder)
    return folder


@pytest.fixture
def tiny_folder(_tiny_model: Path) -> Path:
    """A model folder of cosup; not to be changed."""
    return _tiny_model


@pytest.fixture
def tiny(tiny_folder: Path) -> CoSupModel:
    """The tiny model in float64, in evaluation mode."""
    return CoSupModel.load(tiny_folder, dtype="float64", device="cpu")


@pytest.fixture
def passages() -> list[Passage]:
    """Twelve passages of different lengths, some without a title."""
    texts = [
        ("Norway", "Norway is governed from Oslo."),
        ("Norway", "The krone is the currency of Norway, and banks write it NOK."),
        ("France", "Paris is the capital of France. It stands on the Seine. " * 3),
        ("", "Iron has the symbol Fe."),
        ("Gold", "Gold has the atomic number 79."),
        ("Peru", "Lima!"),
    ]
    return [
        Passage(f"p{i}", f"{text} ({i})", title, {"source": "a" if i < 6 else "b"})
        for i, (title, text) in enumerate(texts * 2)
    ]


@pytest.fixture
def questions() -> list[Question]:
    """Four questions over `passages`: plain, alternatives, a statement and two hops."""
    return [
        Question("q0", "squad", "Which city governs Norway?", answers=["Oslo"], gold=["p0"]),
        Question("q1", "squad", "Which symbol has iron?", answers=["Fe"], gold=["p3", "p9"]),
        Question("q2", "fever", "Gold has the number 79.", answers=["SUPPORTS"], gold=["p4"], label="SUPPORTS"),
        Question("q3", "hotpotqa", "Currency of the country of Oslo?", answers=["krone"], gold=["p0", "p1"]),
    ]


@pytest.fixture
def examples() -> list[Example]:
    """Three examples over `passages`: one retrieval, two with text around, and none."""
    return [
        Example("e0", "squad", "Which city governs Norway?", (Evidence("p0", "Oslo", negatives=("p2",)),)),
        Example(
            "e1",
            "squad",
            "What of gold and iron?",
            (Text("Well, "), Evidence("p4", "Gold has 79", also=("p10",)), Text("and"), Evidence("p3", "Fe is iron.")),
        ),
        Example("e2", "squad", "Hello?", (Text("Hello, world!"),)),
    ]
