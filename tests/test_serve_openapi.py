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
        operation: Any = found.ok()
        statuses = seen.setdefault((operation.method.upper(), operation.path), set())

        def ask(case: Any, statuses: set[int] = statuses) -> None:
            answer = case.call(base_url=address, timeout=60)
            case.validate_response(answer, checks=(not_a_server_error, status_code_conformance))
            statuses.add(answer.status_code)

        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            try:
                cases = operation.as_strategy(generation_mode=mode)
                hypothesis.given(case=cases)(QUIET(ask))()
            except hypothesis.errors.Unsatisfiable:
                assert mode == schemathesis.GenerationMode.NEGATIVE  # nothing can be wrong with a bare GET
    assert set(seen) == OPERATIONS
    bodies = {statuses for (method, _), statuses in _frozen(seen) if method == "POST"}
    assert all({200, 400} & statuses for statuses in bodies)


QUIET = hypothesis.settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def _frozen(seen: dict[tuple[str, str], set[int]]) -> list[tuple[tuple[str, str], frozenset[int]]]:
    return [(operation, frozenset(statuses)) for operation, statuses in seen.items()]
