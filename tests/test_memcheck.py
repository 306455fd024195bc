"""The calls for the memory checker, without a GPU: every kernel and branch is among them, and the shapes suit them."""

import functools
import importlib.util
import pkgutil
import re
import typing
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest

import pallas_kernels
from pallas_kernels import memcheck
from pallas_kernels.mixed_matmul import pallas_mosaic_gpu
from pallas_kernels.mixed_matmul.configs import MosaicConfig
from pallas_kernels.mixed_matmul.mosaic_gpu.config import MULTIPROCESSORS, MosaicGpuConfig
from pallas_kernels.mixed_matmul.mosaic_gpu.split.config import MosaicGpuSplitConfig
from pallas_kernels.mixed_matmul.triton_tiles import Problem
from pallas_kernels.packing import PackedWeight
from pallas_kernels.registry import Implementation, Operation

HAS_HOPPER_KERNELS = jax.__version_info__ >= (0, 11)
KERNELS = {
    "quantize_activations",
    "swiglu_quantize",
    "rms_norm_quantize",
    "decode_attention",
    "mixed_matmul_few_tokens",
    "mixed_matmul_many_tokens",
}
HOPPER_KERNELS = {"mixed_matmul_mosaic_gpu", "mixed_matmul_mosaic_gpu_split"}


@pytest.fixture(scope="module")
def jobs() -> list[memcheck.Job]:
    """All calls, those of the Hopper kernels also where they cannot be traced."""
    return [
        *memcheck.quantizing_jobs(),
        *memcheck.triton_matmul_jobs(),
        *memcheck.hopper_matmul_jobs(),
        *memcheck.attention_jobs(),
    ]


def operations() -> Iterator[Operation]:
    """Every operation of the package."""
    for module in pkgutil.iter_modules(pallas_kernels.__path__):
        if module.ispkg and importlib.util.find_spec(f"pallas_kernels.{module.name}.api"):
            yield importlib.import_module(f"pallas_kernels.{module.name}.api").OPERATION


def is_kernel(name: str, implementation: Implementation) -> bool:
    """Not the reference, and not a kernel that is interpreted: that is a partial of one that is not."""
    return name != "xla" and not isinstance(implementation.run, functools.partial)


def settings(function: Callable[..., Any]) -> dict[str, Any]:
    """What a call has bound by name."""
    assert isinstance(function, functools.partial)
    return function.keywords


def test_every_implementation_of_every_operation_is_among_the_calls(jobs: list[memcheck.Job]):
    called = {function.func for function, _ in jobs if isinstance(function, functools.partial)}
    kernels = {
        (operation.name, name): implementation.run
        for operation in operations()
        for name, implementation in operation.implementations.items()
        if is_kernel(name, implementation)
    }
    assert len({operation for operation, _ in kernels}) >= 5
    assert {key for key, run in kernels.items() if run not in called} == set()
    assert pallas_mosaic_gpu.quantized_linear in called


def test_every_kernel_is_among_the_calls(jobs: list[memcheck.Job]):
    """Each call is traced with its kernel: a shape that a kernel cannot take is an error here."""
    traced = {
        name
        for function, arguments in jobs
        if HAS_HOPPER_KERNELS or not is_of_hopper(function)
        for name in re.findall(r"\bname(?:_and_src_info)?=(\w+)", str(jax.make_jaxpr(function)(*arguments)))
    }
    expected = KERNELS | (HOPPER_KERNELS if HAS_HOPPER_KERNELS else set())
    assert expected <= traced


def test_both_layouts_in_one_term_and_in_two(jobs: list[memcheck.Job]):
    quantizing = [settings(function) for function, _ in jobs if "terms" in settings(function)]
    choices = {(call["terms"], call["layout"], call["config"].num_warps) for call in quantizing}
    assert {(terms, layout) for terms, layout, _ in choices} == {
        (terms, layout) for terms in (1, 2) for layout in ("signed", "unsigned")
    }
    assert len({warps for *_, warps in choices}) == 2  # those of few groups, and of many


def is_of_hopper(function: Callable[..., Any]) -> bool:
    """Whether a call is one of the Hopper kernels."""
    return isinstance(function, functools.partial) and function.func.__module__ == pallas_mosaic_gpu.__name__


def matmuls(jobs: list[memcheck.Job]) -> Iterator[tuple[MosaicConfig, Problem]]:
    """The settings and sizes of the Hopper kernels' calls."""
    for function, arguments in jobs:
        if is_of_hopper(function):
            x, weight = arguments[:2]
            assert isinstance(weight, PackedWeight)
            tokens = x.shape[0] if isinstance(x, jax.Array) else x.tokens
            problem = Problem(tokens, weight.in_features, weight.group_size, weight.n4, weight.n8)
            if function.func is pallas_mosaic_gpu.quantized_linear:
                yield settings(function)["config"], problem
            else:
                yield pallas_mosaic_gpu.config_for(tokens, weight, settings(function)["config"]), problem


def kind(config: MosaicConfig) -> str:
    """Which kernel the settings are for."""
    return "unsigned" if isinstance(config, MosaicGpuConfig) and config.unsigned else type(config).__name__


def kinds() -> set[str]:
    """Every kernel that a tuned table may name."""
    classes = typing.get_args(MosaicConfig)
    return {"unsigned", *(each.__name__ for one in classes for each in (one, *one.__subclasses__()))}


def test_every_hopper_kernel_stores_either_output_with_a_bias_and_without(jobs: list[memcheck.Job]):
    calls = [(function, arguments) for function, arguments in jobs if is_of_hopper(function)]
    found = {
        (kind(config), jax.numpy.dtype(settings(function)["out_dtype"]).name, arguments[2] is not None)
        for (function, arguments), (config, _) in zip(calls, matmuls(jobs), strict=True)
    }
    assert found == {(each, *output) for each in kinds() for output in (("float32", True), ("bfloat16", False))}


def test_every_hopper_kernel_has_channels_of_4_bits_of_8_bits_and_of_both(jobs: list[memcheck.Job]):
    found = {(kind(config), problem.n4 > 0, problem.n8 > 0) for config, problem in matmuls(jobs)}
    assert found == {(each, *bits) for each in kinds() for bits in ((True, False), (False, True), (True, True))}


def test_some_clusters_have_two_sets_of_sums(jobs: list[memcheck.Job]):
    sets = {
        (config.cluster > 1, config.sets_of_sums(problem, MULTIPROCESSORS))
        for config, problem in matmuls(jobs)
        if isinstance(config, MosaicGpuSplitConfig)
    }
    assert sets == {(False, 1), (False, 2), (True, 1), (True, 2)}


@pytest.mark.skipif(not HAS_HOPPER_KERNELS, reason="the kernels need JAX 0.11 or later, and say so")
def test_every_order_of_unsigned_tiles_is_among_the_calls(jobs: list[memcheck.Job]):
    """One wave with whole tiles and with halved 8-bit ones; several that turn, with halves in the last one."""
    from pallas_kernels.mixed_matmul.mosaic_gpu.unsigned.kernel import UnsignedKernel

    found, tokens = set(), set()
    for config, problem in matmuls(jobs):
        if isinstance(config, MosaicGpuConfig) and config.unsigned:
            sizes = (problem.tokens, problem.n4, problem.n8, problem.num_groups, problem.group_size)
            kernel = UnsignedKernel(*sizes, 4, config)
            blocks = kernel.blocks(MULTIPROCESSORS)
            found.add((kernel.splits8(blocks), kernel.turn(blocks) > 0, kernel.halved(blocks) > 0))
            tokens.add((problem.tokens % 2, problem.tokens % 16 > 0))
    assert found == {(False, False, False), (True, False, False), (False, True, True)}
    assert tokens == {(0, False), (0, True), (1, True)}


def test_attention_runs_in_one_program_and_in_several():
    splits = {function.keywords["config"].splits for function, _ in memcheck.attention_jobs()}
    assert min(splits) == 1
    assert max(splits) > 1


@pytest.mark.skipif(not HAS_HOPPER_KERNELS, reason="the kernels need JAX 0.11 or later, and say so")
def test_hopper_calls_lower_without_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """On the size with most groups: more than one block of zero points, and both bit widths."""
    monkeypatch.setattr(memcheck, "SIZES", memcheck.SIZES[-1:])
    for function, arguments in memcheck.hopper_matmul_jobs():
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
        assert "mosaic_gpu" in lowered.as_text()


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]):
    if jax.default_backend() == "gpu":
        pytest.skip("this machine has a GPU")
    assert memcheck.main() == 1
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
