"""Answering speed against the plain reading of the paper's code: same model, same type, same questions, one run.

    python benchmarks/engine.py [--quick] [--dtype TYPE] [--questions FILE --passages FILE] [--model NAME] [--free]

The plain side answers one question at a time, searches a flat index that it builds over the question's 100 candidates,
and reads everything again after every retrieval and every closed claim (`plain.py`). Ours searches one index of 50,000
passages with 16 rows, and with one. Passages have 100 to 160 words; without --passages, passages of the built-in
worldfacts are joined to that length. Of the 50,000 vectors only those of 112 passages are the model's: the others point
away from every question, so that they cost a search what real ones do and are never found.

An untrained model writes no control tokens. So both sides follow a plan: every answer has --retrievals retrievals, each
with a claim of half to one and a half times --claim-tokens tokens, and then ends; all tokens of claims are the model's
own greedy choice. With --free a trained model decides for itself on both sides.

Figures: `speedup_16_rows` and `speedup_1_row`, answers per second over those of the plain side; `..._no_guesses`, the
same without reading ahead; `seconds_vs_generate` and `seconds_vs_generate_1_row`, seconds per token over those of
`generate` of transformers, same contexts, same number of tokens, no guesses; `search_share`, of the time at 16 rows
that goes into searching; `same_text`, share of answers whose text up to the second retrieval is the plain side's (the
plain side may insert a passage twice, ours never does).
"""

import argparse
import copy
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import plain
import torch
from report import report
from torch import Tensor, nn

from cosup.config import ModelSection
from cosup.data import Passage, read_passages, read_questions
from cosup.data.worldfacts import worldfacts
from cosup.engine import Options, Session, Token
from cosup.engine.reader import Gen
from cosup.engine.row import Row
from cosup.index import FaissIndex, Index, build_index
from cosup.model import CoSupModel, Dtype, compute_dtype

WORDS = range(100, 161)
EMBEDDED, INDEXED, CANDIDATES, ROWS, MAX_LENGTH = 112, 50_000, 100, 16, 1024
Plan = Sequence[int | None]
Vectors = Mapping[str, np.ndarray]


class Answers(NamedTuple):
    """Seconds of the whole run, and ids of each answer."""

    seconds: float
    written: list[list[int]]


class Run(NamedTuple):
    """Seconds of the whole run, ids of each answer, seconds to each first token, tokens sampled, the session."""

    seconds: float
    written: list[list[int]]
    first: list[float]
    sampled: int
    session: Session


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        figures = measure(arguments, Path(folder))
    for name, value in figures.items():
        print(f"{name:28} {value:10.4f}")
    report("engine", figures, config_of(arguments))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16 questions instead of 48; 4 of them at one row")
    parser.add_argument("--questions", type=Path, help="JSONL of questions")
    parser.add_argument("--passages", type=Path, help="JSONL of passages")
    parser.add_argument("--model", default="smollm2-135m", help="what a recipe's model.gen may be, or a run folder")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of both sides")
    parser.add_argument("--free", action="store_true", help="no plan: the model is trained")
    parser.add_argument("--retrievals", type=int, default=3)
    parser.add_argument("--claim-tokens", type=int, default=24)
    arguments = parser.parse_args()
    if (arguments.questions is None) != (arguments.passages is None):
        parser.error("--questions and --passages go together")
    return arguments


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    model = load(arguments.model, arguments.dtype)
    passages, questions = data(arguments)
    prompts = [model.template.prompt(question, task=task) for question, task in questions]
    vectors = dict(zip([p.id for p in passages], model.embed_passages(passages), strict=True))
    index = make_index(model, prompts, passages, vectors, folder)
    plans = [plan(model, arguments, seed) for seed in range(len(prompts))]
    options = Options(max_retrievals=arguments.retrievals, max_new_tokens=512, rows=ROWS)
    gen = copy.deepcopy(model.gen)
    gen.set_attn_implementation("sdpa")

    few, rounds = (4, 1) if arguments.quick else (12, 2)

    def answer(some: slice) -> Answers:
        return plain_side(model, gen, index, vectors, prompts[some], plans[some])

    # question by question and half by half, so that a machine that slows down does so for both sides
    alone = [
        (
            answer(slice(i, i + 1)),
            our_side(model, index, prompts[i : i + 1], plans[i : i + 1], replace(options, rows=1)),
            our_side(model, index, prompts[i : i + 1], plans[i : i + 1], replace(options, rows=1, guesses=0)),
        )
        for i in range(few)
    ]
    few_plain, one, bare = (sum(run.seconds for run in runs) for runs in zip(*alone, strict=True))
    tell("plain", few, few_plain)
    tell("1 row", few, one)
    tell("1 row, no guesses", few, bare)
    first = answer(slice(few, len(prompts) // 2))
    many = our_side(model, index, prompts, plans, options)
    second = answer(slice(len(prompts) // 2, len(prompts)))
    plain_seconds = few_plain + first.seconds + second.seconds
    plain_written = [ids for run, _, _ in alone for ids in run.written] + first.written + second.written
    tell("plain, all", len(prompts), plain_seconds)
    tell("16 rows", len(prompts), many.seconds)
    contexts = [[token for token in ids if token != model.template.ret][:300] for ids in plain_written[:ROWS]]
    figures = {
        "speedup_16_rows": plain_seconds / many.seconds,
        "speedup_1_row": few_plain / one,
        "speedup_1_row_no_guesses": few_plain / bare,
        "seconds_vs_generate": against_generate(model, gen, index, contexts, rounds=rounds),
        "seconds_vs_generate_1_row": against_generate(model, gen, index, contexts[:1], rounds=rounds),
        "same_text": same_text(model, prompts, plain_written, many.written),
        "same_text_1_row": statistics.mean(
            same_text(model, [prompt], theirs.written, ours.written)
            for prompt, (theirs, ours, _) in zip(prompts, alone, strict=False)
        ),
        "plain_answers_per_second": len(prompts) / plain_seconds,
        "answers_per_second": len(prompts) / many.seconds,
        "tokens_of_context": statistics.mean(map(len, plain_written)),
    }
    for name, runs in (("", [many]), ("_1_row", [ours for _, ours, _ in alone])):
        seconds = sum(run.seconds for run in runs)
        for part in ("reading", "writing", "searching", "sampling"):
            share = sum(getattr(run.session.seconds, part) for run in runs) / seconds
            figures[("search" if part == "searching" else part) + f"_share{name}"] = share
        figures[f"first_token_seconds{name}"] = statistics.median(time for run in runs for time in run.first)
        figures[f"seconds_per_token{name}"] = seconds / sum(run.sampled for run in runs)
    return figures


def tell(what: str, answers: int, seconds: float) -> None:
    print(f"{what:28} {answers:4} answers in {seconds:7.1f} s", flush=True)


def load(name: str, dtype: Dtype) -> CoSupModel:
    """The model of both sides."""
    folder = Path(name)
    if (folder / "cosup.json").is_file() or (folder / "model" / "cosup.json").is_file():
        return CoSupModel.load(folder, dtype=dtype, device="cpu")
    return CoSupModel.start(ModelSection(gen=name)).to(compute_dtype(dtype, "cpu")).eval()


def data(arguments: argparse.Namespace) -> tuple[list[Passage], list[tuple[str, str]]]:
    """As many passages as are embedded, all of the right length, and the questions with their tasks."""
    if arguments.questions is None:
        facts = worldfacts()
        passages, asked = joined(facts.passages), facts.test
    else:
        passages = [p for p in read_passages(arguments.passages) if len(p.text.split()) in WORDS]
        asked = list(read_questions(arguments.questions))
    count = 16 if arguments.quick else 48
    return passages[:EMBEDDED], [(question.question, question.task) for question in asked[:count]]


def joined(passages: Sequence[Passage]) -> list[Passage]:
    """Neighbouring passages as one, each just longer than the least number of words."""
    stream, out = iter(passages), []
    for first in stream:
        text = first.text
        while len(text.split()) < WORDS.start and (following := next(stream, None)):
            text += " " + following.text
        out.append(Passage(first.id, " ".join(text.split()[: WORDS.stop - 1]), first.title))
    return out


class Embedded(NamedTuple):
    """An embedder whose vectors are there already."""

    fingerprint: str
    dim: int
    vectors: Vectors

    def embed_passages(self, passages: Sequence[Passage]) -> np.ndarray:
        """The vectors of these passages, in order."""
        return np.stack([self.vectors[passage.id] for passage in passages])


def make_index(
    model: CoSupModel, prompts: list[list[int]], passages: list[Passage], vectors: Vectors, folder: Path
) -> FaissIndex:
    """The embedded passages, and as many others as an index of 50,000 has."""
    index = build_index(passages, Embedded(model.fingerprint, model.dim, vectors), folder / "index")
    noise = np.random.default_rng(0).standard_normal((INDEXED - len(passages), index.dim)).astype(np.float32)
    away = noise - 4 * index.dim**0.5 * model.query(prompts).mean(0)
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    others = [Passage(f"other-{i}", passages[i % len(passages)].text) for i in range(len(away))]
    index.add(others, away)
    assert len(index) == INDEXED
    return index


def plan(model: CoSupModel, arguments: argparse.Namespace, seed: int) -> Plan:
    """Control tokens where they come, None where the model chooses; empty with --free."""
    if arguments.free:
        return ()
    t, rng = model.template, random.Random(seed)
    low, high = arguments.claim_tokens // 2, arguments.claim_tokens * 3 // 2
    tokens: list[int | None] = []
    for _ in range(arguments.retrievals):
        tokens += [t.ret, *[None] * rng.randint(low, high), t.ce]
    return [*tokens, t.eos]


def follow(logits_V: Tensor, token: int | None, controls: list[int]) -> None:
    """Changes the logits so that the plan's token is chosen, or none of the control tokens."""
    logits_V[controls] = -torch.inf
    if token is not None:
        logits_V[token] = torch.inf


class PlannedHead(nn.Module):
    """Gen's head for the plain side, which calls it once for every token that it chooses."""

    def __init__(self, head: nn.Module, tokens: Plan, controls: list[int]):
        super().__init__()
        self.head, self.tokens, self.controls = head, iter(tokens), controls

    def forward(self, state_1D: Tensor) -> Tensor:
        """The planned token's logit is infinite."""
        logits_1V: Tensor = self.head(state_1D)
        follow(logits_1V[0], next(self.tokens), self.controls)
        return logits_1V


class PlannedSession(Session):
    """A session whose requests follow their plans."""

    plans: Sequence[Plan]

    def _choose(self, rows: list[Row], logits_RV: Tensor) -> None:
        for row, logits_V in zip(rows, logits_RV, strict=True):
            if self.plans[row.request]:
                follow(logits_V, self.plans[row.request][row.sampled], controls(self._model))
        super()._choose(rows, logits_RV)


def controls(model: CoSupModel) -> list[int]:
    t = model.template
    return [t.ret, t.cs, t.ce, t.eos]


class PlainGen(NamedTuple):
    """What `plain_answer` uses of a causal LM."""

    model: Any
    lm_head: Any


def plain_side(
    model: CoSupModel, gen: Any, index: FaissIndex, vectors: Vectors, prompts: list[list[int]], plans: Sequence[Plan]
) -> Answers:
    """The answers one by one. Candidates are found beforehand, outside the time."""
    t = model.template
    head = gen.get_output_embeddings()
    seconds, written = 0.0, []
    found = index.search(model.query(prompts), CANDIDATES)
    for prompt, hits, tokens in zip(prompts, found, plans, strict=True):
        candidates = index.get([hit.id for hit in hits])
        vectors_ND = np.stack([vectors[p.id] for p in candidates])
        ids = [t.inserted(p, max_tokens=t.settings.max_passage_tokens)[:-1] for p in candidates]
        lm = PlainGen(gen.base_model, PlannedHead(head, tokens, controls(model)) if tokens else head)
        started = time.perf_counter()
        answer, _ = plain.plain_answer(
            lm, prompt, vectors_ND, ids, ret=t.ret, cs=t.cs, ce=t.ce, eos=t.eos, max_length=MAX_LENGTH
        )
        seconds += time.perf_counter() - started
        written.append(answer)
    return Answers(seconds, written)


prepared = cache(Gen.of)  # once for a model, as an engine does it when it is made


def our_side(model: CoSupModel, index: Index, prompts: list[list[int]], plans: Sequence[Plan], options: Options) -> Run:
    session = PlannedSession(model, index, options, gen=prepared(model))
    session.plans = plans
    written: list[list[int]] = [[] for _ in prompts]
    first: dict[int, float] = {}
    sampled = 0
    started = time.perf_counter()
    for prompt in prompts:
        session.submit(prompt)
    while session.active or session.waiting:
        for number, event in session.step():
            if isinstance(event, Token):
                written[number].append(event.id)
                sampled += not event.inserted
                if not event.inserted:
                    first.setdefault(number, time.perf_counter() - started)
    return Run(time.perf_counter() - started, written, list(first.values()), sampled, session)


def same_text(
    model: CoSupModel, prompts: list[list[int]], plain_written: list[list[int]], ours: list[list[int]]
) -> float:
    """Share of answers that are alike up to the second retrieval."""
    t = model.template

    def beginning(ids: list[int]) -> list[int]:
        places = [place for place, token in enumerate(ids) if token == t.ret]
        return ids[: places[1]] if len(places) > 1 else ids

    pairs = zip(prompts, plain_written, ours, strict=True)
    return statistics.mean(beginning(theirs[len(prompt) :]) == beginning(own) for prompt, theirs, own in pairs)


def against_generate(
    model: CoSupModel, gen: Any, index: Index, contexts: list[list[int]], *, rounds: int, tokens: int = 48
) -> float:
    """Our seconds per token over those of `generate`, both from the same contexts, both with the same choices."""
    width, pad = max(map(len, contexts)), model.template.eos
    ids = torch.tensor([[pad] * (width - len(context)) + context for context in contexts])
    mask = torch.tensor([[0] * (width - len(context)) + [1] * len(context) for context in contexts])
    suppressed = controls(model)
    settings = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": pad}
    seconds = []
    for ours in (False, True) * rounds:
        started = time.perf_counter()
        if ours:
            options = Options(mode="none", max_new_tokens=tokens, rows=len(contexts), guesses=0)
            our_side(model, index, contexts, [[None] * tokens for _ in contexts], options)
        else:
            gen.generate(input_ids=ids, attention_mask=mask, suppress_tokens=suppressed, **settings)
        seconds.append(time.perf_counter() - started)
    return sum(seconds[1::2]) / sum(seconds[::2])


def config_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "model": Path(arguments.model).name,
        "plan": "free" if arguments.free else [arguments.retrievals, arguments.claim_tokens],
        "quick": arguments.quick,
        "questions": arguments.questions.name if arguments.questions else "worldfacts",
        "passages_indexed": INDEXED,
        "passage_words": [WORDS.start, WORDS.stop - 1],
        "rows": ROWS,
        "dtype": arguments.dtype,
    }


if __name__ == "__main__":
    main()
