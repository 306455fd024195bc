"""The page that tells how to replace one piece: its code runs as it stands there, and does what it says."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_chat_model import save_tiny_chat_model

from convert.__main__ import main as convert
from mixllm_jax import quantize
from mixllm_jax.checkpoint import CheckpointReader
from mixllm_jax.errors import OptionError
from mixllm_jax.quantization.pieces import Pieces
from mixllm_jax.quantization.report import model_segments
from mixllm_jax.quantization.rounding import round_to_nearest
from mixllm_jax.quantization.salience_file import SalienceScores
from pallas_kernels.mixed_matmul.api import OPERATION
from pallas_kernels.packing import PackedWeight, dequantize

pytestmark = pytest.mark.quick_compile

PAGE = Path(__file__).parents[1] / "docs" / "research.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory):
    """The folder in which the code of the page ran on a tiny model, and the names that it defined."""
    folder = tmp_path_factory.mktemp("research")
    (folder / "hf").mkdir()
    save_tiny_chat_model(folder / "hf")
    assert convert(["--from-hf", str(folder / "hf"), "--out", str(folder / "smollm2")]) == 0
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    names: dict = {"__name__": "my_script"}
    registered = dict(OPERATION.implementations)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
        yield folder, names
    OPERATION.implementations.clear()
    OPERATION.implementations.update(registered)


def eight_bit_mask(folder: Path) -> np.ndarray:
    masks = []
    for name, part in CheckpointReader(folder).read_parts():
        if name.startswith("layer_"):
            for linear in ("attention.qkv_proj", "attention.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
                weight = part[f"{linear}.weight"]
                assert isinstance(weight, PackedWeight)
                masks.append(np.isin(np.arange(weight.out_features), weight.channel_order[weight.n4 :]))
    return np.concatenate(masks)


def test_folders_name_the_functions_that_made_them(page) -> None:
    folder, _ = page
    found = {
        path.parent.name: json.loads(path.read_text()).get("quantization_source", {}).get("replaced")
        for path in folder.glob("*/mixllm.json")
    }
    assert found == {
        "smollm2": None,
        "paper": None,
        "fisher": {"score": "my_script.fisher"},
        "by-error": None,
        "by-weight": {"choose": "my_script.by_weight"},
        "plain-gptq": {"quantize_weight": "my_script.plain_gptq"},
        "clipped": {"quantize_weight": "my_script.clipped_rounding"},
    }


def test_own_score_is_what_ranks_the_channels(page, tmp_path) -> None:
    """With one sequence, Eq. 4 is |f + f^2 / 2| and the page's score is f^2 / 2."""
    _, names = page
    scores = {}
    for name, pieces in (("paper", Pieces()), ("fisher", Pieces(score=names["fisher"]))):
        settings = names["settings"] | {"samples": 1}
        quantize("smollm2", tmp_path / name, pieces=pieces, **settings)
        scores[name] = SalienceScores.read(tmp_path / name).scores.astype(np.float64)
        mask = eight_bit_mask(tmp_path / name)
        assert scores[name][mask].min() >= scores[name][~mask].max()
    first = np.sqrt(2 * scores["fisher"])
    either = np.stack([np.abs(scores["fisher"] + first), np.abs(scores["fisher"] - first)])
    scale = scores["paper"].max()
    assert np.abs(either - scores["paper"]).min(axis=0).max() < 1e-5 * scale
    assert np.abs(scores["paper"] - scores["fisher"]).max() > 0.1 * scale


def test_own_scores_from_a_file_decide(page) -> None:
    folder, names = page
    mask, scores = eight_bit_mask(folder / "by-error"), names["by_error"].scores
    assert scores[mask].min() >= scores[~mask].max()
    assert (mask != eight_bit_mask(folder / "paper")).any()


def test_own_choice_keeps_its_budget_of_weights(page) -> None:
    folder, _ = page
    segments = model_segments(CheckpointReader(folder / "by-weight").config)
    lengths = np.concatenate([np.full(s.channels, s.in_features) for s in segments])
    mask, scores = eight_bit_mask(folder / "by-weight"), SalienceScores.read(folder / "paper").scores
    budget = lengths.sum() * round(0.1 * len(lengths)) / len(lengths)
    assert budget - lengths.max() < lengths[mask].sum() <= budget
    assert (scores / lengths)[mask].min() >= (scores / lengths)[~mask].max()


def test_own_rounding_is_what_is_stored(page, tmp_path) -> None:
    folder, names = page
    rounded = Pieces(quantize_weight=lambda weight, _, mask, size: round_to_nearest(weight, mask, size))
    quantize("smollm2", tmp_path / "own", salience="paper", pieces=rounded, **names["settings"])
    quantize("smollm2", tmp_path / "rtn", salience="paper", method="rtn", **names["settings"])
    own, rtn = (json.loads((tmp_path / name / "mixllm.json").read_text())["parts"] for name in ("own", "rtn"))
    assert own == rtn
    assert own != json.loads((folder / "clipped" / "mixllm.json").read_text())["parts"]


def test_clip_search_of_the_page_is_nearer_where_inputs_are_large(page) -> None:
    """A claim about the example itself: the weighted error it minimises is below that of plain rounding."""
    _, names = page
    rng = np.random.default_rng(0)
    weight = names["jnp"].asarray(rng.standard_t(3, (40, 64)), names["jnp"].float32)
    hessian, mask = np.diag(rng.uniform(0.1, 9.0, 64)), np.arange(40) % 4 == 0
    errors = []
    for rounding in (names["clipped_rounding"], lambda weight, _, mask, size: round_to_nearest(weight, mask, size)):
        codes, scales, *_ = (np.asarray(part, np.float64) for part in rounding(weight, hessian, mask, 32))
        delta = codes * np.repeat(scales, 32, axis=1) - np.asarray(weight, np.float64)
        errors.append((delta**2 @ np.diagonal(hessian)).sum())
    assert errors[0] < 0.95 * errors[1]


def test_own_kernel_computes_the_product(page) -> None:
    _, names = page
    activations, weight = names["activations"], names["weight"]
    scales = np.repeat(np.asarray(activations.scales, np.float64).T, weight.group_size, axis=1)
    expected = np.asarray(activations.codes) * scales @ np.asarray(dequantize(weight), np.float64).T
    assert np.allclose(names["mine"], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    other_layout = dataclasses.replace(activations, layout="unsigned")
    assert "signed codes" in OPERATION.implementations["mine"].refuses(other_layout, weight, None, out_dtype=None)


def test_functions_that_return_something_else_are_told_so(page, tmp_path) -> None:
    _, names = page
    indices = Pieces(choose=lambda scores, segments, count: np.argsort(-scores)[:count])
    with pytest.raises(ValueError, match=r"choose must return bool \[\d+\], one for each channel; found int64"):
        quantize("smollm2", tmp_path / "a", salience="paper", pieces=indices, **names["settings"])

    def shifted(weight, hessian, eight_bit, group_size):
        result = round_to_nearest(weight, eight_bit, group_size)
        return result._replace(zero_points=result.zero_points + 1)

    with pytest.raises(ValueError, match=r"4-bit codes with their zero point must be 0\.\.15, found \d+\.\.16"):
        quantize(
            "smollm2", tmp_path / "b", salience="paper", pieces=Pieces(quantize_weight=shifted), **names["settings"]
        )


def test_whatever_can_be_called_has_a_name() -> None:
    class Scaled:
        def __call__(self, inputs, output_gradient, delta):
            return delta

    def powered(inputs, output_gradient, delta, exponent, norm):
        return delta

    here = f"{__name__}.test_whatever_can_be_called_has_a_name.<locals>"
    partial = functools.partial(powered, exponent=2, norm=round_to_nearest)
    for score, name in (
        (Scaled(), f"{here}.Scaled"),
        (jax.jit(powered), f"{here}.powered"),
        (partial, f"{here}.powered(exponent=2, norm=mixllm_jax.quantization.rounding.round_to_nearest)"),
    ):
        assert Pieces(score=score).replaced() == {"score": name}


def test_a_run_is_not_resumed_with_another_function(page, tmp_path) -> None:
    _, names = page

    def dies(weight, hessian, eight_bit, group_size):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize("smollm2", tmp_path / "a", salience="paper", pieces=Pieces(quantize_weight=dies), **names["settings"])
    with pytest.raises(OptionError, match=r"quantization_source\.replaced differ"):
        quantize("smollm2", tmp_path / "a", salience="paper", **names["settings"])
