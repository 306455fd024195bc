"""Kernels with other work around them on a GPU give the same bits every time: a race would show as another result."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from kernel_cases import require_hopper

from mixllm_jax.generation import Engine
from mixllm_jax.models.presets import PRESETS
from mixllm_jax.models.random_weights import WeightFormat, random_decoder
from pallas_kernels.benchmark_data import bfloat16_array, packed_weight
from pallas_kernels.mixed_matmul import pallas_mosaic_gpu
from pallas_kernels.mixed_matmul.api import quantized_linear
from pallas_kernels.mixed_matmul.mosaic_gpu.split.config import MosaicGpuQuantizeConfig

pytestmark = pytest.mark.gpu

TIMES = 40


@pytest.mark.parametrize("tokens", [1, 5, 16, 33, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (3000, 1408)])
def test_a_layer_gives_the_same_bits_every_time(n: int, k: int, tokens: int):
    weight, x = packed_weight(n, k, 128, 0.1, seed=tokens), bfloat16_array((tokens, k), tokens)

    @jax.jit
    def results(x, weight):
        return [quantized_linear(x, weight, out_dtype=jnp.bfloat16) for _ in range(2)]

    first = jax.block_until_ready(results(x, weight)[0])
    different = [jnp.any(out != first) for _ in range(TIMES) for out in results(x, weight)]
    assert not jnp.any(jnp.stack(different))


@pytest.mark.xfail(
    strict=True, reason="other values in the last tile of 8-bit channels in 6 % of the launches: why the kernel is off"
)
def test_the_kernel_that_quantises_its_activations_gives_the_same_bits_every_time():
    require_hopper()
    weight, x = packed_weight(4096, 4096, 128, 0.1, seed=1), bfloat16_array((1, 4096), 1)
    config = MosaicGpuQuantizeConfig(8, 4, 1, 16, 2)
    run = jax.jit(
        lambda x, weight: pallas_mosaic_gpu.quantized_linear(x, weight, None, out_dtype="bfloat16", config=config)
    )
    first = jax.block_until_ready(run(x, weight))
    different = [jnp.any(run(x, weight) != first) for _ in range(600)]
    assert not jnp.any(jnp.stack(different))


@pytest.mark.parametrize("batch", [1, 16])
def test_a_model_generates_the_same_tokens_every_time(batch: int):
    config = dataclasses.replace(PRESETS["llama-3.1-8b"], num_layers=2, vocab_size=2048)
    runner = Engine(random_decoder(config, WeightFormat.from_name("W4.4A8")))
    prompts = [[7 * row + place for place in range(30 + row)] for row in range(batch)]
    first, *others = [[result.tokens for result in runner.generate(prompts, max_tokens=64)] for _ in range(5)]
    assert all(tokens == first for tokens in others)
