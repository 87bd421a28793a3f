import textwrap
from pathlib import Path

import pytest
import yaml

from cosup.config import Recipe, UserError, dump_recipe, load_recipe, parse_recipe

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
PAPER = sorted((FOLDER / "paper").glob("*.yaml"))
MINIMAL = "name: small\ndata: {train: [t.jsonl], passages: [p.jsonl]}\n"


@pytest.fixture
def write(tmp_path):
    def write_recipe(text=MINIMAL):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else textwrap.dedent(text).encode())
        return path

    return write_recipe


def _refused(path, *overrides):
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Reading


def test_a_key_that_stands_twice_is_named(write):
    twice = MINIMAL + "train: {batch_size: 8}\nseed: 1\nseed: 2\n"
    assert "the key 'seed' stands twice" in _refused(write(twice))
    nested = MINIMAL + "train:\n  lambda: 1\n  batch_size: 2\n  lambda: 3\n"
    assert "the key 'lambda' stands twice" in _refused(write(nested))


def test_a_recipe_with_only_name_and_data_takes_the_defaults(write):
    recipe = load_recipe(write())
    assert recipe == Recipe.model_validate({"name": "small", "data": {"train": ["t.jsonl"], "passages": ["p.jsonl"]}})
    assert (recipe.train.lambda_, recipe.model.similarity, recipe.data.max_tokens) == (1.0, "cosine", 1024)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_names_every_key_of_its_sections(path):
    recipe = load_recipe(path)
    written, valid = yaml.safe_load(path.read_text()), yaml.safe_load(dump_recipe(recipe))
    missing = [f"{name}.{key}" for name in ("model", "data", "train") for key in set(valid[name]) - set(written[name])]
    assert missing == []
    assert set(written) == set(valid)


def test_there_are_shipped_recipes():
    assert len(RECIPES) >= 2
    assert len(PAPER) >= 6


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_recipes_have_its_values_and_differ_in_what_their_name_says(path):
    recipe, main = load_recipe(path), load_recipe(FOLDER / "paper" / "llama2-7b.yaml")
    assert recipe.name == f"paper-{path.stem}"
    assert (recipe.train.lambda_, recipe.model.temperature, recipe.model.similarity) == (0.01, 1.0, "dot")
    assert (recipe.train.batch_size, recipe.train.epochs, recipe.data.max_tokens) == (64, 3, 1024)
    assert (recipe.train.learning_rate, recipe.train.schedule, recipe.train.epoch_decay) == (2e-5, "epoch", 0.85)
    assert (recipe.train.weight_decay, recipe.train.max_grad_norm, recipe.train.warmup) == (0.0, 1.0, 0.0)
    assert (recipe.train.train_on_passages, recipe.data.only_with_retrieval) == (True, True)
    train = recipe.train.model_copy(update={"objective": main.train.objective})
    model = recipe.model.model_copy(update={"emb": main.model.emb})
    assert recipe.model_copy(update={"name": main.name, "train": train, "model": model}) == main


def test_a_recipe_that_is_written_out_reads_back_equal(write):
    overrides = ["train.lambda=0.5", "data.folder=/données", "train.trainer={seed: 3}", "train.report_to=[wandb]"]
    recipe = load_recipe(write(), overrides)
    assert recipe.train.lambda_ == 0.5
    assert load_recipe(write(dump_recipe(recipe))) == recipe


def test_relative_files_start_in_the_folder_and_absolute_ones_do_not(write):
    data = load_recipe(write(), ["data.folder=/base"]).data
    assert data.resolve(Path("a/b")) == Path("/base/a/b")
    assert data.resolve(Path("/a/b")) == Path("/a/b")


def test_a_recipe_can_not_be_changed_after_validation(write):
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(write()).seed = 2


# What is refused


def test_a_missing_file_is_named(tmp_path):
    assert f"no recipe at {tmp_path / 'none.yaml'}" in _refused(tmp_path / "none.yaml")


@pytest.mark.parametrize("text", ["name: [", "a: b: c", b"name: \xff\xfe", "!!python/object:os.system {}"])
def test_a_file_that_is_not_yaml_is_named(write, text):
    path = write(text)
    assert _refused(path).startswith(f"{path} is not YAML: ")


@pytest.mark.parametrize("text", ["", "- name", "just text", "null"])
def test_a_file_without_a_mapping_holds_no_settings(write, text):
    assert "holds no settings" in _refused(write(text))


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.learning_rat", "train.learning_rate"),
        ("train.lamda", "train.lambda"),
        ("model.temprature", "model.temperature"),
        ("data.max_token", "data.max_tokens"),
        ("sead", "seed"),
        ("temperature", "model.temperature"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_valid_one(write, key, nearest):
    assert f"unknown key {key!r}; the nearest valid one is {nearest!r}" in _refused(write(), f"{key}=1")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.temperature=0", "model.temperature: input should be greater than 0, not 0"),
        ("model.temperature=.nan", "model.temperature: input should be greater than 0, not nan"),
        ("train.lambda=-1", "train.lambda: input should be greater than or equal to 0, not -1"),
        ("train.warmup=1", "train.warmup: input should be less than 1, not 1"),
        ("train.batch_size=many", "train.batch_size: "),
        ("train.objective=both", "train.objective: input should be 'ntp', 'nsp', 'ntp+nsp' or 'separate', not 'both'"),
        ("data.train=[]", "data.train: "),
        ("name=a/b", "name: "),
        ("seed=-1", "seed: input should be greater than or equal to 0, not -1"),
        ("seed=4294967296", "seed: input should be less than 4294967296, not 4294967296"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(write, override, said):
    path = write()
    assert _refused(path, override).startswith(f"{path}: {said}")


def test_a_missing_key_is_named(write):
    assert "the key 'data' is missing" in _refused(write("name: small"))
    assert "the key 'data.passages' is missing" in _refused(write("name: small\ndata: {train: [a]}"))


def test_every_mistake_is_told_at_once(write):
    said = _refused(write(), "model.temperature=0", "train.epochs=-1", "sead=2")
    assert all(part in said for part in ("model.temperature", "train.epochs", "'sead'"))


@pytest.mark.parametrize(
    ("key", "ours"), [("gradient_accumulation_steps", "chunk_size"), ("per_device_train_batch_size", "batch_size")]
)
def test_trainer_keys_that_would_split_the_candidates_are_refused(write, key, ours):
    said = _refused(write(), f"train.trainer.{key}=2")
    assert f"train.trainer.{key}" in said
    assert f"set train.{ours} instead" in said


def test_settings_that_contradict_each_other_are_refused(write):
    assert "emb_layers can't cut Gen's own body" in _refused(write(), "model.emb=gen", "model.emb_layers=2")
    assert "go together" in _refused(write(), "train.eval_steps=5")
    judged = ("train.eval_steps=5", "data.dev=[d.jsonl]")
    assert "save_steps must be 0 or train.eval_steps" in _refused(write(), *judged, "train.save_steps=10")


def test_a_mapping_without_a_file_is_refused_in_the_name_of_the_recipe():
    with pytest.raises(UserError, match=r"^the recipe: the key 'name' is missing"):
        parse_recipe({"data": {"train": ["t"], "passages": ["p"]}})


# Overrides


def test_overrides_are_yaml_values_and_the_last_one_wins(write):
    overrides = ["seed=1", "seed=2", "train.learning_rate=1e-3", "train.max_steps=null", "train.train_on_passages=true"]
    recipe = load_recipe(write("train: {max_steps: 5}\n" + MINIMAL), [*overrides, "data.train=[a, b]", "name= x "])
    assert (recipe.seed, recipe.train.learning_rate, recipe.train.max_steps) == (2, 1e-3, None)
    assert recipe.train.train_on_passages
    assert recipe.data.train == (Path("a"), Path("b"))
    assert recipe.name == "x"


def test_an_override_makes_sections_that_the_file_has_not_and_keeps_the_others(write):
    recipe = load_recipe(write("train: {epochs: 3}\n" + MINIMAL), ["train.trainer.seed=1", "model.emb_layers=2"])
    assert (recipe.train.epochs, recipe.train.trainer, recipe.model.emb_layers) == (3, {"seed": 1}, 2)


def test_an_override_may_hold_further_equals_signs(write):
    assert load_recipe(write(), ["model.gen=a=b"]).model.gen == "a=b"


@pytest.mark.parametrize("override", ["seed", "=1", " =1", ""])
def test_an_override_of_another_form_is_refused(write, override):
    assert f"--set {override!r} is not of the form section.key=value" in _refused(write(), override)


def test_an_override_below_a_value_is_refused(write):
    assert "name is a value, not a section" in _refused(write(), "name.first=1")


@pytest.mark.parametrize("value", ["[", "{a", "!!python/object:os.system x"])
def test_an_override_that_is_not_yaml_is_refused(write, value):
    assert f"{value!r} is not a YAML value" in _refused(write(), f"seed={value}")


def test_an_override_that_is_an_impossible_date_is_refused(write):
    assert "is not a YAML value" in _refused(write(), "name=2024-99-99")


def test_a_folder_in_the_place_of_a_recipe_is_named(tmp_path):
    assert str(tmp_path) in _refused(tmp_path)
