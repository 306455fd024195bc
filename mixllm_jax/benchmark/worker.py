"""Measures one model in one scheme: `python -m mixllm_jax.benchmark.worker PLAN`, one line of JSON for each result.

A process of its own, so that the peak of the device's memory is that of this model. All programs are compiled first, in
parallel and before the weights are there; the compile cache hands those of the prefill to the engine later. Then it
says `compiled` and waits for the end of its input before it uses the device.
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from mixllm_jax.benchmark import roofline
from mixllm_jax.benchmark.cases import Plan
from mixllm_jax.benchmark.measurements import Bench, build_model
from mixllm_jax.generation.memory import device_memory, require_memory

_PROFILED_PROMPT = 2048
"""The longest prompt of the plan up to this is profiled."""


def emit(kind: str, value: dict[str, Any]) -> None:
    """Hands a result to the parent process."""
    print(json.dumps({kind: value}), flush=True)


def note(text: str) -> None:
    """Tells the watcher what is going on."""
    print(text, file=sys.stderr, flush=True)


def compile_all(plan: Plan, cases: list[tuple[int, int]]) -> dict[tuple[int, int], jax.stages.Compiled]:
    """Compiles every program on all cores and returns those for decoding; failures show again when the case runs.

    Lowering is Python: in threads of their own, the programs would only hold each other up, and all be ready last.
    """
    bench = Bench(jax.eval_shape(lambda: build_model(plan)), plan, {})
    prefills = {(prompt, bench.context_of(prompt)) for prompt in plan.prompts}
    before = {(bench.prompt_before(context), context) for batch, context in cases if batch == 1}
    prefills |= {(prompt, context) for prompt, context in before if prompt}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for case in sorted(prefills, reverse=True):
            for lowered in bench.lower_prefill(*case):
                pool.submit(_compile, lowered)
        decodes = {case: pool.submit(_compile, bench.lower_decode(*case)) for case in cases}
    return {case: program for case, future in decodes.items() if (program := future.result()) is not None}


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled | None:
    try:
        return lowered.compile()
    except Exception as error:
        note(f"  compiling failed: {type(error).__name__}: {str(error)[:300]}")
        return None


def main() -> None:
    """Runs the plan given as the only argument."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches every process; the parent says so, once
    plan = Plan.from_json(sys.argv[1])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    began = time.monotonic()
    # The cheapest first, so that the peak of memory so far is that of the case.
    cases = sorted(((batch, context) for batch in plan.batches for context in plan.contexts), key=lambda c: c[0] * c[1])
    programs: dict[tuple[int, int], jax.stages.Compiled] = {}
    if plan.scheme != "stored":
        programs = compile_all(plan, cases)
        note(f"  {plan.scheme}: compiled after {time.monotonic() - began:.0f} s")
    emit("compiled", {})
    sys.stdin.read()  # the parent closes it when the device is ours
    began = time.monotonic()
    bandwidth = roofline.read_bandwidth(2 << 30 if jax.default_backend() == "gpu" else 1 << 24)
    emit("device", {"kind": jax.devices()[0].device_kind, "read_bandwidth_tb_s": round(bandwidth / 1e12, 3)})
    bench = Bench(jax.block_until_ready(build_model(plan)), plan, programs)
    note(f"  weights there after {time.monotonic() - began:.0f} s")

    failed = []

    def guarded(what: str, measure: Callable[[], None]) -> None:
        try:
            measure()
        except Exception as error:  # one case must not cost the others their figures
            note(f"  {what} failed: {type(error).__name__}: {str(error)[:400]}")
            failed.append(what)

    def first_token_case(prompt: int) -> None:
        milliseconds = bench.time_to_first_token(prompt, bench.context_of(prompt))
        emit("row", plan.row(1, prompt, time_to_first_token_ms=round(milliseconds, 2)))

    def decode_case(batch: int, context: int) -> None:
        require_memory(bench.engine.estimate_memory, batch, context, device_memory())
        emit("row", plan.row(batch, context, **bench.decode_case(batch, context, bandwidth)))

    def profile_case(batch: int, context: int, phase: str, measure: Callable[[], dict[str, Any]]) -> None:
        identity = {k: v for k, v in plan.row(batch, context).items() if v is not None}
        emit("profile", identity | {"phase": phase} | measure())

    for batch, context in cases:
        guarded(f"batch {batch}, context {context}", lambda: decode_case(batch, context))  # noqa: B023 (called at once)
    for prompt in sorted(plan.prompts):
        guarded(f"prompt {prompt}", lambda: first_token_case(prompt))  # noqa: B023 (called at once)
    for batch in sorted({plan.batches[0], plan.batches[-1]}) if plan.profile else ():
        context = plan.contexts[0]
        step = functools.partial(bench.profile_decode, batch, context)
        guarded("profile", functools.partial(profile_case, batch, context, "decode", step))
    prompts = [prompt for prompt in plan.prompts if prompt <= _PROFILED_PROMPT]
    if plan.profile and prompts:
        prompt = max(prompts)
        step = functools.partial(bench.profile_prefill, prompt, bench.context_of(prompt))
        guarded("profile", functools.partial(profile_case, 1, prompt, "prefill", step))
    note(f"  done after {time.monotonic() - began:.0f} s")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
