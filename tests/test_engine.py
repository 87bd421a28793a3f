import copy
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config, Qwen3Config

from cosup.config import ModelSection, UserError
from cosup.data import Passage
from cosup.engine import (
    ClaimClosed,
    ClaimOpened,
    Engine,
    Event,
    Finished,
    Inserted,
    Options,
    Retrieved,
    Session,
    Token,
)
from cosup.index import FaissIndex, Hit, build_index
from cosup.model import CoSupModel, ModelSettings
from cosup.template import Response


@pytest.fixture
def index(tiny: CoSupModel, passages: list[Passage], tmp_path: Path) -> FaissIndex:
    return build_index(passages, tiny, tmp_path / "index")


class ScriptedBody(nn.Module):
    """Emits `script[i]` as token i of the sequence, whatever it reads, and remembers what it was fed."""

    dtype = torch.float64
    config = SimpleNamespace(model_type="scripted")

    def __init__(self, script: list[int], vocabulary: int):
        super().__init__()
        self.script, self.vocabulary = script, vocabulary
        self.chunks: list[list[int]] = []
        self.cached: list[int] = []

    def forward(self, input_ids, position_ids, use_cache, attend):  # type: ignore[no-untyped-def]
        self.chunks.append(input_ids[0].tolist())
        attend(0, *[input_ids[:, None, :, None].double()] * 3, None)
        keys, _ = attend.held[0]
        self.cached = keys[0, 0, : int(position_ids.max()) + 1, 0].long().tolist()
        following = [self.script[p + 1] if p + 1 < len(self.script) else 0 for p in position_ids[0].tolist()]
        states = torch.nn.functional.one_hot(torch.tensor([following]), self.vocabulary).double()
        return SimpleNamespace(last_hidden_state=states)


class OnePassage:
    """An index that finds the same passage whatever is asked, and remembers the queries."""

    fingerprint, dim = "same", 0

    def __init__(self, passage: Passage):
        self.passage = passage
        self.queries: list[np.ndarray] = []

    def search(self, queries_QD, k, *, where=None):  # type: ignore[no-untyped-def]
        self.queries.append(queries_QD)
        return [[Hit(self.passage.id, 0.5)] for _ in queries_QD]

    def get(self, ids):  # type: ignore[no-untyped-def]
        return [self.passage for _ in ids]


def scripted(tiny: CoSupModel, script: list[int]) -> tuple[SimpleNamespace, ScriptedBody]:
    vocabulary = len(tiny.template.tokenizer)
    body = ScriptedBody(script, vocabulary)
    gen = SimpleNamespace(
        base_model=body,
        get_output_embeddings=lambda: nn.Identity(),
        config=SimpleNamespace(num_hidden_layers=1, max_position_embeddings=512),
    )
    model = SimpleNamespace(
        gen=gen,
        template=tiny.template,
        device=torch.device("cpu"),
        context=512,
        settings=ModelSettings(),
        fingerprint="same",
        queries=lambda states, contexts: states,
    )
    return model, body


def test_a_scripted_response_gives_its_events_and_reads_every_token_once(
    tiny: CoSupModel, passages: list[Passage]
) -> None:
    t = tiny.template
    passage = passages[0]
    prompt, inserted = t.prompt("Which city?", task="squad"), t.inserted(passage, max_tokens=256)
    before, claim = t.encode("Well:"), t.encode("Oslo")
    sequence = [*prompt, *before, t.ret, *inserted, *claim, t.ce, t.eos]
    model, body = scripted(tiny, sequence)
    index = OnePassage(passage)

    events = list(Engine(model, index).stream(prompt))  # type: ignore[arg-type]

    kinds = [type(event) for event in events if not isinstance(event, Token)]
    assert kinds == [Retrieved, Inserted, ClaimOpened, ClaimClosed, Finished]
    written = [event.id for event in events if isinstance(event, Token)]
    assert written == sequence[len(prompt) :]
    assert [event.id for event in events if isinstance(event, Token) and event.inserted] == inserted
    assert "".join(event.text for event in events if isinstance(event, Token)) == "Well: Oslo"
    assert ClaimClosed(6, 10) in events
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.reason == "stop"
    assert finished.response.well_formed
    assert (finished.response.claims[0].passage, finished.response.claims[0].score) == (passage.id, 0.5)
    assert finished.response.tokens_sampled == len(sequence) - len(prompt) - len(inserted)
    # the last token is never read: nothing follows it
    assert [token for chunk in body.chunks for token in chunk] == sequence[:-1] == body.cached
    assert body.chunks[0] == prompt
    assert inserted in body.chunks
    assert len(index.queries) == 1


def test_a_response_that_ends_inside_a_character_shows_only_whole_ones(
    tiny: CoSupModel, passages: list[Passage]
) -> None:
    t = tiny.template
    prompt, text = t.prompt("?", task="squad"), t.encode("é中é")
    assert len(text) > 3
    model, _ = scripted(tiny, [*prompt, *text, t.eos])
    shown = [e.text for e in Engine(model, OnePassage(passages[0])).stream(prompt) if isinstance(e, Token)]  # type: ignore[arg-type]
    assert "".join(shown) == "é中é"
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in shown)


def drain(session: Session) -> Iterator[tuple[int, Event]]:
    while session.active or session.waiting:
        yield from session.step()


def make_talkative(model: CoSupModel) -> None:
    """Larger weights, so that every rule of the grammar is met often and the states decide when."""
    t = model.template
    generator = torch.Generator().manual_seed(0)
    head = model.gen.get_output_embeddings().weight
    with torch.no_grad():
        for parameter in model.gen.base_model.parameters():
            if parameter.ndim == 2 and parameter.shape[0] not in (head.shape[0], 512):
                parameter.mul_(8)
        head[[t.ret, t.ce, t.eos, t.cs]] = torch.randn(4, head.shape[1], generator=generator, dtype=head.dtype) * 0.1


class Naive:
    """The same rules, one prompt at a time, everything read again for every token, by transformers' own attention."""

    def __init__(self, model: CoSupModel, index: FaissIndex):
        self.gen = copy.deepcopy(model.gen)
        self.gen.set_attn_implementation("eager")
        self.model, self.index, self.met = model, index, Counter[str]()

    def answer(self, prompt: list[int], options: Options) -> tuple[list[int], str]:
        self.options, self.context = options, list(prompt)
        self.written: list[int] = []
        self.inserted: list[bool] = []
        self.used: list[str] = []
        self.searches, self.sampled, self.reason = 0, 0, ""
        self.in_claim = self.gave_up = False
        self.random = random.Random(options.seed)
        if options.retrieve_first or options.mode == "static":
            self.retrieve()
        while not self.reason:
            self.step()
        self.met[self.reason] += 1
        self.met["several retrievals"] += len(self.used) > 1
        return self.written, self.reason

    @torch.no_grad()
    def state(self, ids: list[int]) -> torch.Tensor:
        return self.gen.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]  # type: ignore[no-any-return]

    def step(self) -> None:
        t, logits = self.model.template, self.gen.get_output_embeddings()(self.state(self.context)).detach()
        most = {"cosup": self.options.max_retrievals, "static": 1, "none": 0}[self.options.mode]
        banned = [t.cs] if self.in_claim else [t.cs, t.ce]
        if self.gave_up or self.searches >= most:
            banned.append(t.ret)
        self.met["banned"] += int(logits.argmax()) in banned
        logits[banned] = -torch.inf
        token = self.pick(logits)
        self.sampled += 1
        spent = self.sampled >= self.options.max_new_tokens
        if self.in_claim and token in (t.ret, t.eos):
            self.met["forced [Ret]" if token == t.ret else "forced end"] += 1
            self.close()
        if token == t.ret and not spent:
            self.retrieve()
        elif token == t.ce:
            self.met["closed"] += 1
            self.close()
        else:
            self.put(token)
        text = t.parse(self.written, self.inserted).text
        if token == t.eos or any(stop in text for stop in self.options.stop):
            self.met["stop string"] += token != t.eos
            self.reason = "stop"
        elif spent:
            self.reason = "length"

    def pick(self, logits: torch.Tensor) -> int:
        options = self.options
        if not options.temperature:
            return int(logits.argmax())
        weights = np.exp((logits - logits.max()).numpy() / options.temperature)
        order = np.argsort(-weights, kind="stable")[: options.top_k or None]
        chances = weights[order] / weights[order].sum()
        kept = int(np.searchsorted(np.cumsum(chances), options.top_p)) + 1
        chances = chances[:kept] / chances[:kept].sum()
        return int(order[np.searchsorted(np.cumsum(chances), self.random.random(), side="right")])

    def put(self, token: int, *, inserted: bool = False) -> None:
        self.context.append(token)
        self.written.append(token)
        self.inserted.append(inserted)

    def retrieve(self) -> None:
        t = self.model.template
        query = torch.nn.functional.normalize(self.state([*self.context, t.ret]), dim=-1).float().numpy()[None]
        (hits,) = self.index.search(query, 12)
        self.searches += 1
        fresh = [hit for hit in hits if hit.id not in self.used]
        self.met["best one already read"] += bool(fresh) and fresh[0] != hits[0]
        if not fresh or (self.options.min_score is not None and fresh[0].score < self.options.min_score):
            self.met["nothing found"] += 1
            self.gave_up = True
            return
        self.before = len(self.context)
        self.put(t.ret)
        self.used.append(fresh[0].id)
        for token in t.inserted(self.index.get([fresh[0].id])[0], max_tokens=256):
            self.put(token, inserted=True)
        self.claim, self.in_claim = len(self.context), True

    def close(self) -> None:
        self.put(self.model.template.ce)
        self.in_claim = False
        if self.options.forget_passages:
            self.met["forgotten"] += 1
            self.context[self.before :] = [self.model.template.cs, *self.context[self.claim :]]


def random_prompts(model: CoSupModel, count: int, *, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    words = ["Oslo", "Norway", "krone", "gold", "iron", "Fe", "79", "capital", "which", "city", "France", "Seine"]
    return [model.template.prompt(" ".join(rng.choices(words, k=rng.randint(1, 30))), task="") for _ in range(count)]


def assert_equal_to_naive(
    model: CoSupModel, index: FaissIndex, prompts: list[list[int]], each: list[Options], *, rows: int
) -> Counter[str]:
    """Every token and reason; returns how often each rule was met."""
    session = Engine(model, index, Options(rows=rows)).session()
    for prompt, options in zip(prompts, each, strict=True):
        session.submit(prompt, options=options)
    written: dict[int, list[int]] = {request: [] for request in range(len(prompts))}
    finished: dict[int, Finished] = {}
    for request, event in drain(session):
        if isinstance(event, Token):
            written[request].append(event.id)
        if isinstance(event, Finished):
            finished[request] = event
    reference = Naive(model, index)
    for request, (prompt, options) in enumerate(zip(prompts, each, strict=True)):
        expected = reference.answer(prompt, options)
        assert (written[request], finished[request].reason) == expected
        response = finished[request].response
        assert [claim.passage for claim in response.claims] == reference.used
        assert response.nothing_found == reference.gave_up
        assert len(response.retrieved) == reference.searches
        assert response.tokens_sampled == reference.sampled
        parsed = model.template.parse(reference.written, reference.inserted)
        assert parsed.well_formed or reference.reason == "length" or options.stop
        assert response.text == parsed.text or options.stop
        assert [claim.text for claim in response.claims] == [claim.text for claim in parsed.claims] or options.stop
    return reference.met


ALWAYS = (
    "banned",
    "closed",
    "forced [Ret]",
    "forced end",
    "several retrievals",
    "best one already read",
    "stop",
    "length",
)
CASES = {
    "plain": (1, Options(), ALWAYS),
    "batch": (16, Options(), ALWAYS),
    "retrieve first": (5, Options(retrieve_first=True), ALWAYS),
    "forget passages": (7, Options(forget_passages=True), (*ALWAYS, "forgotten")),
    "min score": (6, Options(min_score=0.05), ("nothing found", "several retrievals", "stop", "length")),
    "forget and min score, retrieve first": (
        3,
        Options(forget_passages=True, min_score=0.05, retrieve_first=True),
        ("nothing found", "forgotten"),
    ),
    "stop strings": (4, Options(stop=("e", "go")), ("stop string",)),
    "static": (8, Options(mode="static"), ("closed", "forced end")),
    "none": (8, Options(mode="none"), ("banned", "stop", "length")),
    "one retrieval": (9, Options(max_retrievals=1), ("banned", "closed")),
    "sampled": (16, Options(temperature=0.15), ("closed", "forced [Ret]", "several retrievals")),
    "sampled, top-k, top-p": (2, Options(temperature=0.3, top_k=20, top_p=0.7), ("closed", "several retrievals")),
}


@pytest.mark.parametrize("case", CASES)
def test_output_equals_a_naive_loop_that_reads_everything_again(tiny: CoSupModel, index: FaissIndex, case: str) -> None:
    rows, options, must_meet = CASES[case]
    prompts = random_prompts(tiny, 200, seed=rows)
    make_talkative(tiny)
    each = [replace(options, max_new_tokens=10 + i % 5, seed=i) for i in range(len(prompts))]
    met = assert_equal_to_naive(tiny, index, prompts, each, rows=rows)
    assert min(met[rule] for rule in must_meet) >= 5, met


def test_requests_with_different_options_share_the_rows(tiny: CoSupModel, index: FaissIndex) -> None:
    prompts = random_prompts(tiny, 60, seed=1)
    make_talkative(tiny)
    each = [replace(list(CASES.values())[i % len(CASES)][1], max_new_tokens=12, seed=i) for i in range(len(prompts))]
    assert_equal_to_naive(tiny, index, prompts, each, rows=16)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "qwen3"])
def test_other_architectures_equal_the_naive_loop_too(
    kind: str, tiny: CoSupModel, passages: list[Passage], tmp_path: Path
) -> None:
    model = of_kind(kind, tiny)
    index = build_index(passages, model, tmp_path / "index")
    prompts = random_prompts(model, 60, seed=2)
    make_talkative(model)
    each = [Options(max_new_tokens=12, forget_passages=bool(i % 2)) for i in range(len(prompts))]
    met = assert_equal_to_naive(model, index, prompts, each, rows=6)
    assert met["forced [Ret]"] + met["forced end"] + met["closed"] >= 5, met


def of_kind(kind: str, tiny: CoSupModel) -> CoSupModel:
    """A tiny random model of another architecture: learned positions, or grouped heads with biases or norms."""
    tokenizer = tiny.template.tokenizer
    common: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 32, "tie_word_embeddings": True,
                              "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    grouped = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
               "max_position_embeddings": 512}  # fmt: skip
    config = {
        "gpt2": lambda: GPT2Config(**common, n_layer=2, n_head=4, n_positions=512),
        "qwen2": lambda: Qwen2Config(**common, **grouped),
        "qwen3": lambda: Qwen3Config(**common, **grouped, head_dim=16),
    }[kind]()
    torch.manual_seed(0)
    gen = AutoModelForCausalLM.from_config(config).double().eval()
    return CoSupModel(gen, copy.deepcopy(gen.base_model), tokenizer=tokenizer)


@pytest.mark.slow
def test_a_real_model_equals_the_naive_loop_in_float32(passages: list[Passage], tmp_path: Path) -> None:
    model = CoSupModel.start(ModelSection()).eval()
    index = build_index(passages, model, tmp_path / "index")
    prompts = [model.template.prompt(f"What of {p.title or 'iron'}, {i}?", task="") for i, p in enumerate(passages)]
    prompts += [model.template.prompt(p.text, task="fever") for p in passages[:8]]
    each = [Options(max_new_tokens=6, retrieve_first=i % 3 > 0, forget_passages=i % 2 > 0) for i in range(20)]
    assert_equal_to_naive(model, index, prompts, each, rows=8)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_response_does_not_depend_on_what_else_is_in_the_batch(
    tiny: CoSupModel, index: FaissIndex, temperature: float
) -> None:
    make_talkative(tiny)
    prompts = random_prompts(tiny, 20, seed=3)
    each = [Options(max_new_tokens=15, temperature=temperature, seed=i) for i in range(len(prompts))]
    alone = [
        Engine(tiny, index, Options(rows=1)).generate([p], options=o)[0] for p, o in zip(prompts, each, strict=True)
    ]
    for rows in (3, 16):
        together = Engine(tiny, index, Options(rows=rows)).generate(prompts, options=each)
        backwards = Engine(tiny, index, Options(rows=rows)).generate(prompts[::-1], options=each[::-1])[::-1]
        for one, other, third in zip(alone, together, backwards, strict=True):
            assert same(one) == same(other) == same(third)
    assert len({response.text for response in alone}) > 10


def same(response: Response) -> Response:
    """Without what may differ: seconds, and the last digits of scores."""
    claims = tuple(replace(claim, score=round(claim.score, 4)) for claim in response.claims)
    scores = tuple(tuple(round(score, 4) for score in each) for each in response.scores)
    return replace(response, seconds=0.0, claims=claims, scores=scores)


def test_another_seed_gives_another_response(tiny: CoSupModel, index: FaissIndex) -> None:
    options = [Options(max_new_tokens=12, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    prompt = tiny.template.prompt("gold", task="")
    first, again, other = Engine(tiny, index).generate([prompt] * 3, options=options)
    assert same(first) == same(again)
    assert first.text != other.text


def test_near_the_end_of_the_context_passages_are_shortened_and_responses_end_whatever_room_is_left(
    tiny: CoSupModel, index: FaissIndex
) -> None:
    text = tiny.template.encode("gold " * 600)
    prompts = [text[: tiny.context - room] for room in range(2, 60)]
    responses = Engine(tiny, index, Options(retrieve_first=True, candidates=1)).generate(prompts)
    assert {response.reason for response in responses} == {"length"}
    assert all(response.tokens_read <= tiny.context for response in responses)
    assert any(response.shortened for response in responses)
    assert any(response.claims and not response.shortened for response in responses)
    assert not responses[0].claims


def test_a_prompt_longer_than_the_context_is_refused(tiny: CoSupModel, index: FaissIndex) -> None:
    with pytest.raises(UserError, match=r"the prompt has .* tokens, and the model reads at most 512"):
        Engine(tiny, index).generate(["gold " * 600])
    with pytest.raises(UserError, match=r"^prompt 2 of 3: the prompt has"):
        Engine(tiny, index).generate(["gold", "gold " * 600, "iron"])


def test_a_stream_gives_the_events_of_the_response_and_closing_it_frees_its_row(
    tiny: CoSupModel, index: FaissIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions: list[Session] = []
    opened = Engine._session
    monkeypatch.setattr(Engine, "_session", lambda *a: sessions.append(opened(*a)) or sessions[-1])
    engine = Engine(tiny, index, Options(max_new_tokens=9, retrieve_first=True))
    *events, finished = engine.stream("gold?")
    assert isinstance(finished, Finished)
    assert same(finished.response) == same(engine.generate(["gold?"])[0])
    assert "".join(event.text for event in events if isinstance(event, Token)) == finished.response.text
    sessions.clear()
    stream = engine.stream("gold?", options=Options(max_new_tokens=9, mode="none"))
    next(stream)
    assert sessions[0].active == 1
    stream.close()  # type: ignore[attr-defined]
    assert sessions[0].active == 0
    with pytest.raises(UserError, match="the prompt is empty"):
        engine.stream([])


def test_options_are_given_for_all_or_for_each_prompt(tiny: CoSupModel, index: FaissIndex) -> None:
    engine = Engine(tiny, index)
    short, long = Options(max_new_tokens=1, mode="none"), Options(max_new_tokens=3, mode="none")
    assert [r.tokens_sampled for r in engine.generate(["gold?", "gold?"], options=[short, long])] == [1, 3]
    assert [r.tokens_sampled for r in engine.generate(["gold?", "gold?"], options=short)] == [1, 1]
    assert engine.generate([]) == []
    with pytest.raises(ValueError, match="there are 2 prompts and 1 options"):
        engine.generate(["gold?", "gold?"], options=[short])


def test_an_index_of_another_model_is_refused(tiny: CoSupModel, index: FaissIndex) -> None:
    index.fingerprint = "0123456789abcdef"
    with pytest.raises(UserError, match=r"built by another model \(fingerprint 0123456789ab"):
        Engine(tiny, index)


def test_control_tokens_typed_in_a_prompt_are_read_as_text(tiny: CoSupModel) -> None:
    t = tiny.template
    prompt = t.prompt("say [Ret] and [Cs] and [Ce] and <eos>", task="squad")
    assert not {t.ret, t.cs, t.ce, t.eos} & set(prompt)
