"""The line of JSON that every benchmark ends with."""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

_PACKAGES = ("cosup", "torch", "transformers", "numpy", "faiss-cpu", "sentence-transformers")


def report(
    benchmark: str, figures: Mapping[str, float], config: Mapping[str, Any], *, threads: int | None = None
) -> None:
    """Prints what was measured, how, on what, with which versions.

    Args:
        benchmark: its name.
        figures: by name, in four significant digits.
        config: what the figures depend on.
        threads: that computed; PyTorch's without.
    """
    has = torch.cpu.get_capabilities()
    line = {
        "benchmark": benchmark,
        "figures": {name: float(f"{value:.4g}") for name, value in figures.items()},
        "config": dict(config),
        "hardware": {
            "cpu": has.get("cpu_name"),
            "threads": threads or torch.get_num_threads(),
            "bf16": bool(has.get("amx_bf16") or has.get("avx512_bf16")),
        },
        "versions": {"python": platform.python_version(), **_versions()},
    }
    print(json.dumps(line))


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # none that this benchmark needs
            continue
    return found
