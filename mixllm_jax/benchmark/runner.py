"""Runs the plans of a benchmark, each in a process of its own, and stores what they find as it comes."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mixllm_jax.benchmark.cases import Plan, Results

_PACKAGES = ("mixllm-jax", "jax", "jaxlib", "flax")


def run_plans(plans: Sequence[Plan], results: Results, *, transformers_batches: Sequence[int] = ()) -> int:
    """Measures every plan; a plan that fails does not stop the others.

    Quantised plans compile at the same time, most of which is Python on one core, and are measured one after another. A
    float plan has the machine to itself, since the compiler times candidates for its products on the device.

    Args:
        plans: What to measure.
        results: Where it goes.
        transformers_batches: Batches at which to measure `transformers` as well; none without.

    Returns:
        How many processes ended with an error.
    """
    alone = [plan for plan in plans if plan.scheme == "bf16"]
    failures = sum(_run_at_once([plan], results) for plan in alone)
    failures += _run_at_once([plan for plan in plans if plan not in alone], results)
    if transformers_batches:
        print("transformers bf16", file=sys.stderr)
        settings: dict[str, Any] = {"model": plans[0].model, "batches": list(transformers_batches)}
        if (bandwidth := results.header["read_bandwidth_tb_s"]) is not None:
            settings["read_bandwidth"] = 1e12 * bandwidth
        with _started(["-m", "mixllm_jax.benchmark.transformers_baseline", json.dumps(settings)]) as process:
            _finish(process, results)
        failures += process.returncode != 0
    return failures


def _run_at_once(plans: Sequence[Plan], results: Results) -> int:
    """Processes that compile at once and are then measured one after another; how many failed."""
    with contextlib.ExitStack() as stack:
        processes = []
        for plan in plans:
            # XLA would launch kernel by kernel while it profiles, and show gaps that are not there otherwise.
            flags = "--xla_enable_command_buffers_during_profiling=true" if plan.profile else ""
            worker = _started(["-m", "mixllm_jax.benchmark.worker", plan.to_json()], flags)
            processes.append(stack.enter_context(worker))
        for process in processes:
            _collect(process, results, until="compiled")
        for plan, process in zip(plans, processes, strict=True):
            print(f"{plan.model} {plan.scheme}", file=sys.stderr)
            _finish(process, results)
    return sum(process.returncode != 0 for process in processes)


@contextlib.contextmanager
def _started(arguments: list[str], xla_flags: str = "") -> Iterator[subprocess.Popen[str]]:
    """A Python process, which does not outlive the context."""
    # Memory as it is needed, up to nearly all, for 70 billion parameters. JAX by itself takes three quarters at once.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {xla_flags}".strip()
    with subprocess.Popen(
        [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _finish(process: subprocess.Popen[str], results: Results) -> None:
    """Let a process use the device, and take what it prints until it ends."""
    assert process.stdin is not None
    process.stdin.close()  # the sign to begin; a process that has failed by now does not mind
    _collect(process, results, until=None)
    process.wait()


def _collect(process: subprocess.Popen[str], results: Results, *, until: str | None) -> None:
    """Take what a process prints, to the line of kind `until` or the end."""
    assert process.stdout is not None
    for line in process.stdout:
        try:
            ((kind, value),) = json.loads(line).items()
        except (ValueError, AttributeError):
            print(line, end="", file=sys.stderr)
            continue
        if kind == until:
            return
        _store(kind, value, results)


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
            "allocation": "8-bit channels of random weights: uniform, the same share of every linear; realistic, by "
            "projection and depth as in SmolLM2-135M, and their numbers rounded up as those of a checkpoint",
            "context": "positions of the cache; the last decode steps before it is full are timed",
            "peak_memory_gb": "peak of the process so far, 1e9 bytes; of one row, with its prefill",
            "roofline_share": "bytes a step must read (weights, keys, values) at the read bandwidth, over its time",
            "time_to_first_token_ms": "a prompt of `context` tokens, from token ids on the host to a token there",
        },
    }


def open_results(path: Path, command: str) -> Results:
    """The results file, with the rows it has already."""
    return Results(path, header(command))
