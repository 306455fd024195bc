"""Device times: how records become times a kernel, and that kernels keep their names on a GPU."""

import gc
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.device_time import kernel_times, repeats_for


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch):
    """Sets what CUPTI gives; returns what it was asked."""
    asked: list[bool] = []

    def use(timings: list[tuple[str, float]]) -> list[bool]:
        cupti = types.SimpleNamespace(
            _cupti_init=lambda: None, _cupti_get_timings=lambda finalize: asked.append(finalize) or timings
        )
        library = types.SimpleNamespace(_mosaic_gpu_ext=cupti)
        profiler = types.SimpleNamespace(mosaic_gpu_lib=library)
        package = types.SimpleNamespace(profiler=profiler)
        monkeypatch.setitem(sys.modules, "jax.experimental.mosaic.gpu", package)
        monkeypatch.setitem(sys.modules, "jax.experimental.mosaic.gpu.profiler", profiler)
        return asked

    return use


def test_median_of_a_launch_times_launches_of_an_execution(records):
    asked = records([("a", 0.002), ("b", 0.001), ("b", 0.009), ("a", 0.004), ("b", 0.003), ("b", 0.003)])
    times = kernel_times(lambda: jnp.zeros(()), [()], 2)
    assert times == pytest.approx({"a": 3.0, "b": 6.0})
    assert asked == [True]  # or unloaded kernels would leave their names behind


@pytest.mark.parametrize("timings", [[], [("a", 1.0), ("a", 1.0), ("b", 1.0)]])
def test_missing_records_are_an_error(records, timings):
    records(timings)
    with pytest.raises(RuntimeError, match="in 2 executions these kernels were timed"):
        kernel_times(lambda: jnp.zeros(()), [()], 2)


def test_repeats():
    assert [repeats_for(sets, 24) for sets in (1, 3, 10, 50)] == [24, 8, 2, 1]


@pytest.mark.gpu
def test_kernels_keep_their_names_when_others_were_unloaded():
    operations = {"sine": jnp.sin, "cosine": jnp.cos, "tanh": jnp.tanh, "exponential": jnp.exp, "sqrt": jnp.sqrt}
    operations |= {"floor": jnp.floor, "ceil": jnp.ceil, "abs": jnp.abs, "sign": jnp.sign, "negate": jnp.negative}
    for size in (1024, 1536, 2048, 2560):
        for name, operation in operations.items():
            x = jnp.ones(size)
            compiled = jax.jit(operation).lower(x).compile()
            assert [name in kernel for kernel in kernel_times(compiled, [(x,)], 2)] == [True]
            del compiled
            gc.collect()
