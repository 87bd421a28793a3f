"""The server against its own description."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import status_code_conformance
from test_serve import running

from cosup.data import Passage
from cosup.engine import Engine, Options
from cosup.index import FaissIndex, build_index
from cosup.model import CoSupModel
from cosup.serve import Limits

OPERATIONS = {
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/embeddings"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/v1/search"),
    ("POST", "/v1/passages"),
    ("GET", "/v1/passages/{id}"),
    ("DELETE", "/v1/passages/{id}"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
}


FEW = hypothesis.settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@pytest.fixture
def address(tiny: CoSupModel, passages: list[Passage], tmp_path: Path) -> Iterator[str]:
    build_index(passages, tiny, tmp_path / "index")
    engine = Engine(tiny, FaissIndex(tmp_path / "index"), Options(rows=2))
    with running(engine, limits=Limits(new_tokens=4)) as address:
        yield address


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_generated_requests_get_no_5xx_and_no_undocumented_status(address: str) -> None:
    """Requests that follow the description and requests that don't, in equal parts, 40 for each operation."""
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    seen: dict[tuple[str, str], set[int]] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        method = operation.method.upper()
        seen[method, operation.path] = statuses(operation, address)
    assert set(seen) == OPERATIONS
    reached = {path: got for (method, path), got in seen.items() if method == "POST"}
    assert all(400 in got for got in reached.values())
    assert all(200 in reached[path] for path in ("/v1/embeddings", "/v1/search", "/v1/passages"))


def statuses(operation: Any, address: str) -> set[int]:
    """What generated requests were answered with, checked one by one."""
    seen: set[int] = set()
    for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

        def ask(case: Any) -> None:
            if isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = "cosup"  # any other is a 404
            answer = case.call(base_url=address, timeout=60)
            case.validate_response(answer, checks=(not_a_server_error, status_code_conformance))
            seen.add(answer.status_code)

        try:
            hypothesis.given(case=operation.as_strategy(generation_mode=mode))(FEW(ask))()
        except hypothesis.errors.Unsatisfiable:
            assert mode == schemathesis.GenerationMode.NEGATIVE  # there is nothing to get wrong
            assert operation.method.upper() != "POST"
    return seen
