import copy
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from cosup.config import UserError
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
from cosup.index import FlatIndex, Hit, build_index
from cosup.model import CoSupModel


@pytest.fixture
def index(tiny: CoSupModel, passages: list[Passage], tmp_path: Path) -> FlatIndex:
    return build_index(passages, tiny, tmp_path / "index")


class ScriptedBody(nn.Module):
    """Emits `script[i]` as token i of the sequence, whatever it reads, and remembers what it was fed."""

    dtype = torch.float64

    def __init__(self, script: list[int], vocabulary: int):
        super().__init__()
        self.script, self.vocabulary = script, vocabulary
        self.chunks: list[list[int]] = []
        self.cached: list[int] = []

    def forward(self, input_ids, position_ids, past_key_values, use_cache, attend):  # type: ignore[no-untyped-def]
        self.chunks.append(input_ids[0].tolist())
        keys, _ = past_key_values.update(*[input_ids[:, None, :, None].double()] * 2, 0)
        self.cached = keys[0, 0, : int(position_ids.max()) + 1, 0].long().tolist()
        following = [self.script[p + 1] if p + 1 < len(self.script) else 0 for p in position_ids[0].tolist()]
        states = torch.nn.functional.one_hot(torch.tensor([following]), self.vocabulary).double()
        return SimpleNamespace(last_hidden_state=states)


class OnePassage:
    """An index that finds the same passage whatever is asked, and remembers the queries."""

    fingerprint = "same"

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
    assert finished.response.claims[0].passage == passage.id
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
    with torch.no_grad():
        for parameter in model.gen.base_model.layers.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
        weight_VD = model.gen.get_output_embeddings().weight
        weight_VD[[t.ret, t.ce, t.eos]] = (
            torch.randn(3, weight_VD.shape[1], generator=generator, dtype=weight_VD.dtype) * 0.1
        )


def naive(model: CoSupModel, index: FlatIndex, prompt: list[int], options: Options) -> tuple[list[int], str]:
    """The same rules, one prompt at a time, everything read again for every token, by transformers' own attention."""
    gen = copy.deepcopy(model.gen)
    gen.set_attn_implementation("eager")
    t, ids, used, in_claim, sampled, forced = model.template, list(prompt), [], False, 0, []
    retrievals = 0
    if options.retrieve_first:
        ids.append(t.ret)
    while True:
        with torch.no_grad():
            out = gen.base_model(input_ids=torch.tensor([ids]))
            state = out.last_hidden_state[0, -1]
            logits = gen.get_output_embeddings()(state)
        if ids[-1] == t.ret:
            query = torch.nn.functional.normalize(state, dim=-1).float().numpy()[None]
            (hits,) = index.search(query, 12)
            best = next(hit for hit in hits if hit.id not in used)
            used.append(best.id)
            retrievals += 1
            ids += t.inserted(index.get([best.id])[0], max_tokens=256)
            in_claim = True
            continue
        if forced:
            token = forced.pop()
        else:
            banned = [t.cs] if in_claim else [t.cs, t.ce]
            if retrievals >= options.max_retrievals:
                banned.append(t.ret)
            logits[banned] = -torch.inf
            token = int(logits.argmax())
            sampled += 1
            if in_claim and token in (t.ret, t.eos):
                forced, token = [token], t.ce
        ids.append(token)
        in_claim = in_claim and token != t.ce
        if token == t.eos:
            return ids[len(prompt) :], "stop"
        if sampled >= options.max_new_tokens:
            return ids[len(prompt) :], "length"


@pytest.mark.parametrize("retrieve_first", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
def test_greedy_output_equals_a_naive_loop_that_reads_everything_again(
    tiny: CoSupModel, index: FlatIndex, rows: int, retrieve_first: bool
) -> None:
    t = tiny.template
    rng = random.Random(rows)
    words = ["Oslo", "Norway", "krone", "gold", "iron", "Fe", "79", "capital", "which", "city", "France", "Seine"]
    prompts = [t.prompt(" ".join(rng.choices(words, k=rng.randint(1, 30))), task="squad") for _ in range(24)]
    make_talkative(tiny)
    options = Options(max_new_tokens=14, max_retrievals=3, rows=rows, retrieve_first=retrieve_first, candidates=12)
    written: dict[int, list[int]] = {request: [] for request in range(len(prompts))}
    reasons: dict[int, str] = {}
    seen: Counter[str] = Counter()
    session = Engine(tiny, index, options).session()
    for prompt in prompts:
        session.submit(prompt)
    for request, event in drain(session):
        if isinstance(event, Token):
            written[request].append(event.id)
        if isinstance(event, Finished):
            reasons[request] = event.reason
            seen[event.reason] += 1
            seen["several retrievals"] += len(event.response.claims) > 1
            seen["not well formed"] += not event.response.well_formed
    for request, prompt in enumerate(prompts):
        expected = naive(tiny, index, prompt, options)
        assert (written[request], reasons[request]) == expected
    assert min(seen["several retrievals"], seen["not well formed"], seen["stop"], seen["length"]) >= 2, seen


def test_rows_do_not_see_each_other(tiny: CoSupModel, index: FlatIndex) -> None:
    prompts = [tiny.template.prompt("gold " * n, task="squad") for n in (1, 30, 7, 2, 19)]
    options = Options(max_new_tokens=8, retrieve_first=True, rows=3)
    together = Engine(tiny, index, options).generate(prompts)
    alone = [Engine(tiny, index, options).generate([prompt])[0] for prompt in prompts]
    assert [response.text for response in together] == [response.text for response in alone]
    assert [response.retrieved for response in together] == [response.retrieved for response in alone]


def test_a_passage_is_shortened_where_the_context_is_nearly_full_and_the_response_ends(
    tiny: CoSupModel, index: FlatIndex
) -> None:
    prompt = tiny.template.encode("gold " * 600)[:485]
    (response,) = Engine(tiny, index, Options(retrieve_first=True)).generate([prompt])
    assert response.reason == "length"
    assert response.tokens_read <= tiny.context


def test_a_prompt_longer_than_the_context_is_refused(tiny: CoSupModel, index: FlatIndex) -> None:
    with pytest.raises(UserError, match=r"the prompt has .* tokens, and the model reads at most 512"):
        Engine(tiny, index).generate(["gold " * 600])


def test_an_index_of_another_model_is_refused(tiny: CoSupModel, index: FlatIndex) -> None:
    index.fingerprint = "0123456789abcdef"
    with pytest.raises(UserError, match=r"built by another model \(fingerprint 0123456789ab"):
        Engine(tiny, index)


def test_control_tokens_typed_in_a_prompt_are_read_as_text(tiny: CoSupModel) -> None:
    t = tiny.template
    prompt = t.prompt("say [Ret] and [Cs] and [Ce] and <eos>", task="squad")
    assert not {t.ret, t.cs, t.ce, t.eos} & set(prompt)
