"""What XLA makes of the decode loop: the cache is updated in place, and the loop's length is known to it."""

import re

import jax
import jax.numpy as jnp
import pytest

from mixllm_jax.benchmark.cases import Plan, Results
from mixllm_jax.benchmark.measurements import Bench
from mixllm_jax.cli import main as cli
from mixllm_jax.generation.decode_loop import DECODE_CHUNK
from mixllm_jax.generation.memory import weight_bytes
from mixllm_jax.models.config import LINEAR_NAMES, ModelConfig
from mixllm_jax.models.random_weights import WeightFormat, random_decoder

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
)


def decode_program(
    kv_bits: int, dtype: jnp.dtype, batch: int = 2, context: int = 2048
) -> tuple[jax.stages.Compiled, int]:
    """The compiled loop, and the bytes of its cache."""
    model = jax.eval_shape(lambda: random_decoder(CONFIG, WeightFormat.from_name("W4.4A8"), dtype=dtype))
    bench = Bench(model, Plan("", "W4.4A8", (), (), (), kv_bits=kv_bits), {})
    return bench.lower_decode(batch, context).compile(), weight_bytes(bench.abstract_state(batch, context).cache)


@pytest.mark.parametrize("kv_bits", [16, 8])
def test_the_donated_cache_is_updated_in_place(kv_bits):
    program, cache_bytes = decode_program(kv_bits, jnp.float32)
    assert program.memory_analysis().alias_size_in_bytes >= cache_bytes


def test_xla_knows_the_length_of_the_loop():
    # Otherwise it would ask the device after every step whether to go on, and wait for the answer.
    program, _ = decode_program(16, jnp.float32)
    assert re.search(rf'known_trip_count"?:\{{"n":"{DECODE_CHUNK}"', program.as_text())


def test_the_loop_does_not_keep_the_weights_unpacked():
    # One token: the CPU multiplies integers, four bytes each where the loop keeps them for its next step.
    program, _ = decode_program(16, jnp.float32, batch=1, context=16)
    weights = CONFIG.num_layers * sum(rows * columns for rows, columns in map(CONFIG.linear_shape, LINEAR_NAMES))
    assert program.memory_analysis().temp_size_in_bytes < weights


@pytest.mark.gpu
@pytest.mark.parametrize("kv_bits", [16, 8])
def test_the_loop_on_the_gpu_copies_no_cache(kv_bits):
    program, cache_bytes = decode_program(kv_bits, jnp.bfloat16)
    shape = rf"\[2,2048,{CONFIG.num_kv_heads},{CONFIG.head_dim}\]"
    assert not re.search(rf"= \S*{shape}\S* copy", program.as_text())
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 4


def test_results_keep_what_an_earlier_run_found(tmp_path):
    plan = Plan("llama-3.1-8b", "W4.4A8", (1,), (512,), (512,))
    path = tmp_path / "results.json"
    results = Results(path, {"command": "x"})
    results.add(plan.row(1, 512, decode_tokens_per_s=100.0))
    results.add(plan.row(1, 512, time_to_first_token_ms=5.0))
    results.add_profile({**plan.row(1, 512), "step_us": 1.0})
    again = Results(path, {"command": "y"})
    again.add(plan.row(4, 512, decode_tokens_per_s=300.0))
    again.add(plan.row(1, 512, decode_tokens_per_s=120.0))
    assert [(row["batch"], row["decode_tokens_per_s"], row["time_to_first_token_ms"]) for row in again.rows] == [
        (1, 120.0, 5.0),
        (4, 300.0, None),
    ]
    assert Results(path, {}).profiles == again.profiles
    assert plan == Plan.from_json(plan.to_json())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either a model folder or --random-weights"),
        (["somewhere", "--random-weights", "llama-3.1-8b"], "either a model folder or --random-weights"),
        (["--random-weights", "llama-9"], r"no model 'llama-9'"),
        (["--random-weights", "llama-3.1-8b", "--schemes", "W3A8"], "unknown scheme 'W3A8'"),
    ],
)
def test_benchmark_refuses_what_it_cannot_measure(arguments, message, capsys):
    assert cli.main(["benchmark", *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)
