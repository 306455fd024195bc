"""The benchmark's processes: compiled at once, measured one after another, none left behind."""

import dataclasses
import json
import os
import signal

import pytest

from mixllm_jax.benchmark import runner
from mixllm_jax.benchmark.cases import Plan, Results, format_table
from mixllm_jax.cli.main import main
from mixllm_jax.errors import OptionError
from mixllm_jax.models.presets import PRESETS, preset

STUB = """
import json, os, sys, time
log, plan = sys.argv[1], json.loads(sys.argv[2])
scheme, peers = plan["scheme"], plan["contexts"][0]  # the context says how many others must have started

def note(event):
    with open(log, "a") as file:
        file.write(f"{event} {scheme} {os.getpid()}\\n")

note("start")
if scheme == "W5A8":
    sys.exit("cannot compile")
deadline = time.monotonic() + 20
while open(log).read().count("start W") < peers:
    if time.monotonic() > deadline:
        sys.exit("the others have not started")
    time.sleep(0.01)
print("not a result", flush=True)
print(json.dumps({"compiled": {}}), flush=True)
sys.stdin.read()
note("begin")
time.sleep(0.2)  # long enough for a process that does not wait for its turn to be seen
print(json.dumps({"row": plan["row"]}), flush=True)
note("end")
sys.exit(3 if scheme == "W6A8" else 0)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs plans of these schemes with the stub; returns failures, the rows' schemes and the log, `[event, scheme]`."""
    log, script = tmp_path / "log", tmp_path / "stub.py"
    script.write_text(STUB)
    started = runner._started

    def stub(arguments, flags=""):
        assert arguments[:2] == ["-m", "mixllm_jax.benchmark.worker"]
        plan = Plan.from_json(arguments[2])
        settings = json.loads(arguments[2]) | {"row": plan.row(1, 16, decode_tokens_per_s=1.0)}
        return started(["-S", str(script), str(log), json.dumps(settings)], flags)

    monkeypatch.setattr(runner, "_started", stub)

    def run_schemes(*schemes):
        quantized = sum(scheme != "bf16" for scheme in schemes)
        plans = [Plan("m", s, (1,), (0 if s == "bf16" else quantized,), ()) for s in schemes]
        results = Results(tmp_path / "results.json", runner.header("test"))
        try:
            failures = runner.run_plans(plans, results)
        finally:
            run_schemes.pids = [int(line.split()[2]) for line in log.read_text().splitlines()]
        stored = json.loads((tmp_path / "results.json").read_text())["rows"]
        events = [line.split()[:2] for line in log.read_text().splitlines()]
        return failures, {row["scheme"] for row in stored}, events

    return run_schemes


def test_quantized_schemes_start_together_and_are_measured_in_turn_and_bf16_is_alone(run):
    failures, stored, events = run("W4A8", "bf16", "W4.4A8", "W8A8")
    assert failures == 0
    assert stored == {"W4A8", "bf16", "W4.4A8", "W8A8"}
    assert events[:3] == [["start", "bf16"], ["begin", "bf16"], ["end", "bf16"]]
    assert {event for event, _ in events[3:6]} == {"start"}
    turns = [[event, scheme] for scheme in ("W4A8", "W4.4A8", "W8A8") for event in ("begin", "end")]
    assert events[6:] == turns


def test_a_process_that_fails_is_counted_and_the_others_are_measured(run):
    failures, stored, events = run("W5A8", "W4A8", "W6A8")  # before it has compiled; not at all; after its row
    assert failures == 2
    assert stored == {"W4A8", "W6A8"}
    assert ["begin", "W5A8"] not in events


def test_an_interrupt_leaves_no_process(run, monkeypatch):
    monkeypatch.setattr(runner, "_store", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run("W4A8", "W4.4A8")
    assert len(set(run.pids)) == 2
    for pid in run.pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_file_that_holds_no_results_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("my notes")
    with pytest.raises(OptionError, match=r"notes\.txt.*no JSON.*--out"):
        Results(tmp_path / "notes.txt", {})


def test_float_weights_have_one_name_in_the_results(tmp_path, monkeypatch):
    plans = []
    monkeypatch.setattr(runner, "run_plans", lambda found, *_, **__: plans.extend(found) or 0)
    command = ["benchmark", "--random-weights", "llama-3.1-8b", "--lm-head-bits", "8", "--out", str(tmp_path / "out")]
    assert main([*command, "--schemes", "BF16,W8A8"]) == 0
    assert [(plan.scheme, plan.lm_head_bits) for plan in plans] == [("bf16", 16), ("W8A8", 8)]
    assert main([*command, "--schemes", ","]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--random-weights", "smollm2-135m", "--contexts", "512,8193"],
            "--contexts 8193: this model takes up to 8192",
        ),
        (["--random-weights", "smollm2-135m", "--prompts", "9000"], "--prompts 9000: this model takes up to 8192"),
        (["folder", "--schemes", "bf16"], "--schemes is for --random-weights"),
        (["--random-weights", "llama-3.1-8b", "--schemes", "bf16", "--random-allocation", "realistic"], "realistic"),
        (["--random-weights", "llama-3.1-8b", "--schemes", "bf16", "--lm-head-bits", "8"], "--lm-head-bits 8"),
        (["--random-weights", "llama-3.1-8b", "--schemes", "bf16", "--embedding-bits", "8"], "--embedding-bits 8"),
    ],
)
def test_options_that_cannot_work_or_would_change_nothing_are_refused(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(runner, "run_plans", lambda *_, **__: pytest.fail("something was measured"))
    assert main(["benchmark", *options, "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("longest", "contexts", "prompts"), [(2048, (512,), (128, 512, 2048)), (64, (64,), (64,))])
def test_by_default_lengths_are_those_that_the_model_takes(tmp_path, monkeypatch, capsys, longest, contexts, prompts):
    plans = []
    monkeypatch.setattr(runner, "run_plans", lambda found, *_, **__: plans.extend(found) or 0)
    short = dataclasses.replace(preset("smollm2-135m"), max_position_embeddings=longest)
    monkeypatch.setitem(PRESETS, "short", short)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmark.json").write_text('{"rows": [{"model": "short", "scheme": "W8A8"}]}')
    assert main(["benchmark", "--random-weights", "short", "--schemes", "W4A8"]) == 0
    assert "W8A8" in capsys.readouterr().out  # the results stored here, and not those of the repository
    assert [(plan.contexts, plan.prompts) for plan in plans] == [(contexts, prompts)]


def test_a_failed_case_says_so_until_it_is_measured_again(tmp_path):
    plan = Plan("m", "bf16", (64,), (512,), ())
    results = Results(tmp_path / "out.json", runner.header("test"))
    for row in ({"decode_tokens_per_s": 7.0}, {"error": "out of memory"}, {"peak_memory_gb": 3.0}):
        results.add(plan.row(64, 512, **row))
        (stored,) = json.loads((tmp_path / "out.json").read_text())["rows"]
        assert {name: value for name, value in stored.items() if name in row} == row
        assert ("error" in stored) == ("error" in row)
        assert (stored["decode_tokens_per_s"] == 7.0) == ("decode_tokens_per_s" in row)
        assert ("out of memory" in format_table(results.rows)) == ("error" in row)
