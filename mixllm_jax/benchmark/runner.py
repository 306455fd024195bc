"""Runs the plans of a benchmark, each in a process of its own, and stores what they find as it comes."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixllm_jax.benchmark.cases import Plan, Results

_PACKAGES = ("mixllm-jax", "jax", "jaxlib", "flax")


def run_plans(plans: Sequence[Plan], results: Results, *, transformers_batches: Sequence[int] = ()) -> int:
    """Measures every plan; a plan that fails does not stop the others.

    Args:
        plans: What to measure.
        results: Where it goes.
        transformers_batches: Batches at which to measure `transformers` as well; none without.

    Returns:
        How many processes ended with an error.
    """
    failures = 0
    for plan in plans:
        print(f"{plan.model} {plan.scheme}", file=sys.stderr)
        # XLA would launch kernel by kernel while it profiles, and show gaps that are not there otherwise.
        flags = "--xla_enable_command_buffers_during_profiling=true" if plan.profile else ""
        failures += _run(["-m", "mixllm_jax.benchmark.worker", plan.to_json()], results, flags)
    if transformers_batches:
        print("transformers bf16", file=sys.stderr)
        settings: dict[str, Any] = {"model": plans[0].model, "batches": list(transformers_batches)}
        if (bandwidth := results.header["read_bandwidth_tb_s"]) is not None:
            settings["read_bandwidth"] = 1e12 * bandwidth
        failures += _run(["-m", "mixllm_jax.benchmark.transformers_baseline", json.dumps(settings)], results)
    return failures


def _run(arguments: list[str], results: Results, xla_flags: str = "") -> bool:
    # Nearly all of the memory: 70 billion parameters need it. JAX takes three quarters by default.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93"} | os.environ
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {xla_flags}".strip()
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                ((kind, value),) = json.loads(line).items()
            except (ValueError, AttributeError):
                print(line, end="", file=sys.stderr)
                continue
            _store(kind, value, results)
    return process.returncode != 0


def _store(kind: str, value: dict[str, Any], results: Results) -> None:
    if kind == "row":
        results.add(value)
        print("  " + json.dumps({k: v for k, v in value.items() if v is not None}), file=sys.stderr)
    elif kind == "profile":
        results.add_profile(value)
        print("  profile " + json.dumps(value), file=sys.stderr)
    elif kind == "device":
        results.header |= {"device": value["kind"], "read_bandwidth_tb_s": value["read_bandwidth_tb_s"]}
        print("  " + json.dumps(value), file=sys.stderr)


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "from source"
    return found


def header(command: str) -> dict[str, Any]:
    """What stands above the rows."""
    return {
        "command": command,
        "device": None,
        "read_bandwidth_tb_s": None,
        "versions": versions(),
        "notes": {
            "context": "positions of the cache; the last decode steps before it is full are timed",
            "peak_memory_gb": "peak of the process so far, 1e9 bytes; of one row, with its prefill",
            "roofline_share": "bytes a step must read (weights, keys, values) at the read bandwidth, over its time",
            "time_to_first_token_ms": "a prompt of `context` tokens, from token ids on the host to a token there",
        },
    }


def open_results(path: Path, command: str) -> Results:
    """The results file, with the rows it has already."""
    return Results(path, header(command))
