"""What Prometheus is told."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cosup.serve.worker import Worker

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters, gauges and histograms of one server.

    Args:
        worker: whose rows and queue are read when Prometheus asks.
    """

    def __init__(self, worker: Worker):
        self._registry = registry = CollectorRegistry()
        labels = ["method", "route", "status"]
        self.requests = Counter("cosup_requests", "Requests answered.", labels, registry=registry)
        self.tokens = Counter("cosup_tokens", "Tokens, of prompts and written.", ["kind"], registry=registry)
        self.retrievals = Counter("cosup_retrievals", "Searches that the model asked for.", registry=registry)
        self.first_token = Histogram(
            "cosup_first_token_seconds", "From arrival to the first text.", buckets=_SECONDS, registry=registry
        )
        self.token = Histogram(
            "cosup_token_seconds", "Between two texts of an answer.", buckets=_SECONDS, registry=registry
        )
        rows = Gauge("cosup_rows_in_use", "Rows that answer a request.", registry=registry)
        rows.set_function(lambda: worker.active)
        waiting = Gauge("cosup_queue_waiting", "Requests that wait for a row.", registry=registry)
        waiting.set_function(lambda: worker.waiting)

    def text(self) -> bytes:
        """All of them in Prometheus's text format."""
        return generate_latest(self._registry)
