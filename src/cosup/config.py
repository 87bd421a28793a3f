"""Recipes: every setting of a run as pydantic models, their YAML, and the error a user can cause."""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Objective = Literal["ntp", "nsp", "ntp+nsp", "separate"]
Part = Literal["gen", "emb", "projection", "lm_head", "embeddings"]
Similarity = Literal["cosine", "dot"]
RELEASED = "cosup-smollm2-135m"
"""The model that comes with cosup, and is taken where none is named."""


class UserError(ValueError):
    """An error its user can mend: what is wrong, the value received, what is allowed, what to do next, in one sentence.

    The command line prints it without a traceback and exits with 2.
    """


class Section(BaseModel):
    """A part of a recipe. Unknown keys are errors; values are not changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class LoraSection(Section):
    """Low-rank adapters, trained in the place of the weights; the rows of the control tokens are trained with them."""

    on: Annotated[tuple[Literal["gen", "emb"], ...], Field(min_length=1)] = ("gen", "emb")
    """Which models get one; the other is not trained."""
    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of the update of each matrix."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Before the update."""
    targets: tuple[str, ...] = ()
    """Names of the matrices, as peft takes them; without any, all linear ones but the head."""


class ModelSection(Section):
    """Which models are trained and how a state is compared with a passage."""

    gen: str = "smollm2-135m"
    """Gen: `smollm2-135m`, a Hugging Face name, a local folder, or a model folder of cosup."""
    emb: str | None = None
    """Emb_seq: named as `gen`, or the encoder `all-minilm-l6-v2`; `gen`: Gen's own body; without it, a copy of that."""
    emb_layers: Annotated[int, Field(ge=1)] | None = None
    """Keep only the first N layers of Emb_seq."""
    similarity: Similarity = "cosine"
    """How h and e(c) are compared."""
    temperature: Annotated[float, Field(gt=0)] = 0.05
    """tau in L_NSP."""
    pooling: Literal["auto", "last", "mean"] = "auto"
    """A passage's vector: the state of its last token, or the mean; `auto`: last for decoders, mean for encoders."""
    lora: LoraSection | None = None
    """Adapters instead of full training."""


class DataSection(Section):
    """What is learnt from."""

    folder: Path = Path()
    """Where relative file names of this section start."""
    train: Annotated[tuple[Path, ...], Field(min_length=1)]
    """JSONL files of examples, or of questions, which become examples by their task's rule."""
    passages: Annotated[tuple[Path, ...], Field(min_length=1)]
    """JSONL files of the passages that they cite."""
    max_tokens: Annotated[int, Field(ge=16)] = 1024
    """Longest training sequence in tokens; a longer example is left out, and counted."""
    max_passage_tokens: Annotated[int, Field(ge=8)] = 256
    """Longest passage in tokens, embedded or inserted; a longer one is shortened, and counted."""
    only_with_retrieval: bool = False
    """Leave out examples that retrieve nothing, and count them."""
    dev: tuple[Path, ...] = ()
    """Files like `train`, to judge the model by during training."""

    def resolve(self, path: Path) -> Path:
        """`path` as it stands if absolute, else below `folder`."""
        return path if path.is_absolute() else self.folder / path


class TrainSection(Section):
    """How it is learnt."""

    objective: Objective = "ntp+nsp"
    """Which losses are trained; `separate`: Gen by ntp, and apart from it one LM by nsp that encodes both sides."""
    lambda_: Annotated[float, Field(ge=0, alias="lambda")] = 1.0
    """Weight of L_NSP in L = L_NTP + lambda * L_NSP."""
    train_on_passages: bool = False
    """Whether inserted tokens carry the ntp loss, as in the paper's released configuration."""
    negatives: Annotated[int, Field(ge=0)] = 0
    """Hard negatives taken from each citation's own list."""
    neighbours: Annotated[int, Field(ge=1)] = 1
    """Examples whose passages share a title that stand together in a batch: hard negatives that cost nothing."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Examples in an optimisation step, over all processes: their distinct passages are the candidates."""
    chunk_size: Annotated[int, Field(ge=1)] | None = None
    """Examples, and passages, whose activations a process holds at once; same gradient (GradCache)."""
    activation_checkpointing: bool = False
    """Keep only each layer's input and compute the rest again in the backward pass."""
    freeze: tuple[Part, ...] = ()
    """Parts that are not trained; `lm_head` of tied embeddings stops the head's gradient alone."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """AdamW's peak learning rate."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the run in which the rate rises linearly from 0."""
    schedule: Literal["linear", "cosine", "constant", "epoch"] = "linear"
    """How it falls to 0 afterwards; `constant` does not, and `epoch` multiplies it by `epoch_decay` after each."""
    epoch_decay: Annotated[float, Field(gt=0, le=1)] = 0.85
    """What `schedule: epoch` multiplies the rate by."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Clipping, over all that is trained together; under `separate`, over each model apart."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the examples."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Ends earlier, after so many steps."""
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    """Ends earlier, after so many minutes; warm-up and schedule follow whichever limit comes first."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; `auto` takes bfloat16 where the hardware multiplies in it, else float32. Losses are float32."""
    compile: Literal["auto"] | bool = "auto"
    """Fuse each layer's elementwise work by torch.compile; `auto`: models of 50M parameters or more, on one CPU."""
    eval_steps: Annotated[int, Field(ge=0)] = 0
    """Losses and in-batch accuracy on `data.dev` every so many steps; the model that did best is the one kept."""
    save_steps: Annotated[int, Field(ge=0)] = 0
    """A checkpoint every so many steps; 0: at every judgement by `data.dev`, or none but the finished model."""
    log_steps: Annotated[int, Field(ge=1)] = 5
    """A line of metrics every so many steps."""
    report_to: tuple[str, ...] = ()
    """Trackers besides metrics.jsonl: `tensorboard`, `wandb`, `trackio`."""
    trainer: dict[str, Any] = {}
    """Any other field of transformers.TrainingArguments; one without effect here is refused."""

    def steps(self, examples: int) -> int:
        """Optimisation steps of a run over so many examples: by epochs or by `max_steps`, whichever ends first."""
        by_epochs = math.ceil(math.ceil(examples / self.batch_size) * self.epochs)
        return min(by_epochs, self.max_steps or by_epochs)


class Recipe(Section):
    """One training run."""

    name: Annotated[str, Field(pattern=r"^[\w.+-]+$")]
    """Name of the run; its folder is `runs/<name>` unless `--out` says otherwise."""
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    """Everything random follows from it."""
    model: ModelSection = ModelSection()
    data: DataSection
    train: TrainSection = TrainSection()

    @model_validator(mode="after")
    def _refuse_settings_that_contradict(self) -> Self:
        taken = {"gradient_accumulation_steps": "chunk_size", "per_device_train_batch_size": "batch_size"}
        for key, ours in taken.items():
            if key in self.train.trainer:
                raise ValueError(
                    f"train.trainer.{key} would split the optimisation step and with it the candidates of nsp; "
                    f"set train.{ours} instead"
                )
        if self.model.emb == "gen" and self.model.emb_layers is not None:
            raise ValueError("model.emb_layers can't cut Gen's own body; leave it out, or leave out model.emb: gen")
        if bool(self.train.eval_steps) != bool(self.data.dev):
            raise ValueError("train.eval_steps and data.dev go together: give both, or neither")
        if self.train.eval_steps and self.train.save_steps not in (0, self.train.eval_steps):
            raise ValueError(
                "train.save_steps must be 0 or train.eval_steps: the best model can be kept only where it is saved"
            )
        return self


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML readers silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key!r} stands twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a YAML recipe and applies `a.b=value` overrides, whose values are YAML too.

    Raises:
        UserError: no such file, not YAML, an unknown key (the nearest valid one is named), a value out of range.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _OnceLoader)
    except FileNotFoundError:
        raise UserError(f"there is no recipe at {path}: name a YAML file such as recipes/squad-cpu.yaml") from None
    except OSError as e:
        raise UserError(f"the recipe {path} can't be read: {e.strerror}; name a YAML file") from None
    except (yaml.YAMLError, ValueError) as e:  # yaml raises a bare ValueError for a date that is none
        raise UserError(f"{path} is not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds no settings: a recipe is a YAML mapping with at least `name` and `data`")
    for override in overrides:
        _override(raw, override)
    return parse_recipe(raw, origin=str(path))


def parse_recipe(raw: Mapping[str, Any], *, origin: str = "the recipe") -> Recipe:
    """Validates a mapping as a recipe; see `load_recipe` for what it raises."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as e:
        raise UserError(f"{origin}: " + "; ".join(_explain(dict(error)) for error in e.errors())) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back equal."""
    return yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {override!r} is not of the form section.key=value, such as train.batch_size=8")
    *parents, leaf = key.strip().split(".")
    for parent in parents:
        raw = raw.setdefault(parent, {})
        if not isinstance(raw, dict):
            raise UserError(f"--set {override!r}: {parent} is a value, not a section")
    try:
        raw[leaf] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        raise UserError(f"--set {override!r}: {value!r} is not a YAML value") from None


def _explain(error: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(where, list(_keys(Recipe)), n=1, cutoff=0.0)
        return f"unknown key {where!r}; the nearest valid one is {near[0]!r}"
    if error["type"] == "missing":
        return f"the key {where!r} is missing"
    reason = error["msg"].removeprefix("Value error, ")
    reason = reason[:1].lower() + reason[1:]
    return reason if not where else f"{where}: {reason}, not {error['input']!r}"


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        key = prefix + (field.alias or name)
        yield key
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, key + ".")
