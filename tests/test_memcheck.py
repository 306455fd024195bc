"""The calls for the memory checker, without a GPU: every kernel is among them, and the shapes suit the kernels."""

import re

import jax
import pytest

from pallas_kernels import memcheck

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


def test_every_kernel_is_among_the_calls():
    """Each call is traced with its kernel: a shape that a kernel cannot take is an error here."""
    jobs = [
        *memcheck.quantizing_jobs(),
        *memcheck.triton_matmul_jobs(),
        *(memcheck.hopper_matmul_jobs() if HAS_HOPPER_KERNELS else ()),
        *memcheck.attention_jobs(),
    ]
    traced = {
        name
        for function, arguments in jobs
        for name in re.findall(r"\bname(?:_and_src_info)?=(\w+)", str(jax.make_jaxpr(function)(*arguments)))
    }
    expected = KERNELS | (HOPPER_KERNELS if HAS_HOPPER_KERNELS else set())
    assert expected <= traced


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
