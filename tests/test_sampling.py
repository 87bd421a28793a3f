from collections import Counter

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from cosup.engine import Options
from cosup.engine.sampling import choose


def random_logits(rows: int, vocabulary: int = 50) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2


def test_without_a_temperature_the_likeliest_token_is_chosen() -> None:
    logits = random_logits(6)
    assert choose(logits, [Options()] * 6, [0.9] * 6) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-310, 5e-324, 1e-30])
def test_the_smallest_temperature_chooses_the_likeliest_token(temperature: float) -> None:
    logits = random_logits(6)
    logits[0, :49] = -torch.inf
    assert choose(logits, [Options(temperature=temperature)] * 6, [0.9] * 6) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "options",
    [
        Options(temperature=1.0),
        Options(temperature=0.5),
        Options(temperature=1.3, top_k=7),
        Options(temperature=1.0, top_p=0.6),
        Options(temperature=0.8, top_k=9, top_p=0.7),
        Options(temperature=1.0, top_p=1e-6),
        Options(temperature=1.0, top_k=1000),
    ],
)
def test_draws_are_distributed_as_transformers_would(options: Options) -> None:
    logits = random_logits(1)
    wanted = TemperatureLogitsWarper(options.temperature)(None, logits)  # type: ignore[arg-type]
    if options.top_k:
        wanted = TopKLogitsWarper(options.top_k)(None, wanted)  # type: ignore[arg-type]
    if options.top_p < 1:
        wanted = TopPLogitsWarper(options.top_p)(None, wanted)  # type: ignore[arg-type]
    chances = wanted.softmax(-1)[0]
    draws = [(i + 0.5) / 4000 for i in range(4000)]
    chosen = Counter(choose(logits.expand(4000, -1), [options] * 4000, draws))
    for token, chance in enumerate(chances.tolist()):
        assert chosen[token] / 4000 == pytest.approx(chance, abs=0.001)


def test_a_rows_token_depends_on_nothing_but_the_row() -> None:
    logits = random_logits(4)
    options = [
        Options(),
        Options(temperature=1.0),
        Options(temperature=2.0, top_k=5),
        Options(temperature=1, top_p=0.5),
    ]
    draws = [0.1, 0.7, 0.99, 0.4]
    together = choose(logits, options, draws)
    alone = [choose(logits[i : i + 1], options[i : i + 1], draws[i : i + 1])[0] for i in range(4)]
    assert together == alone


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_a_token_that_is_not_allowed_is_never_drawn(draw: float) -> None:
    logits = torch.full((1, 10), -torch.inf)
    logits[0, 3] = 0.0
    assert choose(logits, [Options(temperature=1.0)], [draw]) == [3]
