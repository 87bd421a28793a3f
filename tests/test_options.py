import math
from typing import Any

import pytest

from cosup.config import UserError
from cosup.engine import Options
from cosup.model import AnswerSettings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"max_retrievals": -1}, "max_retrievals must be at least 0"),
        ({"candidates": 0}, "candidates must be at least 1"),
        ({"rows": 0}, "rows must be at least 1"),
        ({"guesses": -1}, "guesses must be at least 0"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"temperature": -0.1}, "temperature must be 0 or more, not -0.1"),
        ({"temperature": math.nan}, "temperature must be 0 or more, not nan"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"mode": "classic"}, "mode must be one of cosup, static, none, not 'classic'"),
        ({"stop": ("a", "")}, "stop must be a sequence of strings, none empty"),
        ({"stop": "a"}, "stop must be a sequence of strings"),
        ({"mode": "none", "retrieve_first": True}, "retrieve_first asks for a retrieval, and mode 'none'"),
        ({"max_retrievals": 0, "retrieve_first": True}, "with max_retrievals 0 allows none"),
    ],
)
def test_an_option_out_of_range_is_refused_in_one_sentence(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Options(**wrong)


def test_modes_say_when_and_how_often_is_retrieved() -> None:
    told = {mode: Options(mode=mode, max_retrievals=3) for mode in ("cosup", "static", "none")}  # type: ignore[arg-type]
    assert {mode: (o.retrieves_first, o.most_retrievals) for mode, o in told.items()} == {
        "cosup": (False, 3),
        "static": (True, 1),
        "none": (False, 0),
    }


def test_a_search_is_deep_enough_for_a_passage_that_was_not_inserted_before() -> None:
    assert Options(candidates=2, max_retrievals=6).depth == 6
    assert Options(candidates=8, max_retrievals=6).depth == 8


def test_a_model_s_own_choices_stand_where_a_request_makes_none() -> None:
    own = AnswerSettings(statements=True, hybrid=0.2)
    settled = Options(quote=True, hybrid=0.0).settled(own)
    assert (settled.quote, settled.statements, settled.hybrid) == (True, True, 0.0)
    assert Options(rows=3).settled(own) == Options(rows=3, quote=False, statements=True, hybrid=0.2)
