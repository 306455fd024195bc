"""The claims of the method, measured as divergence from the float model on text that was not calibrated on.

The model is tiny and random, but its output channels differ in size as those of real models do, and the text is sampled
from the model itself, so that it has something to predict. docs/results has the same comparison on SmolLM2-135M.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixllm_jax.checkpoint import CheckpointReader, CheckpointWriter
from mixllm_jax.models.config import ModelConfig
from mixllm_jax.models.decoder import Decoder, random_parameters
from mixllm_jax.models.parameters import Execution
from mixllm_jax.quantization.driver import quantize_checkpoint
from mixllm_jax.quantization.salience_file import SalienceScores
from mixllm_jax.quantization.scheme import QuantizationScheme

pytestmark = pytest.mark.quick_compile

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=96,
    hidden_size=128,
    intermediate_size=192,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_position_embeddings=64,
)
CALIBRATION_SEQUENCES, LENGTH = 8, 48
SETTINGS = {
    "W4.4A8": {},
    "W4A8": {"eight_bit_share": 0.0},
    "W4.8A8": {"eight_bit_share": 0.2},
    "W8A8": {"eight_bit_share": 1.0},
    "per-layer": {"allocation": "per-layer"},
    "random": {"allocation": "random"},
    "W4.4A8 rounding": {"method": "rtn"},
    "W4A8 rounding": {"method": "rtn", "eight_bit_share": 0.0},
    "W4A16 rounding": {"method": "rtn", "eight_bit_share": 0.0, "activation_bits": 16},
}


def write_float_model(folder: Path) -> None:
    generator = np.random.default_rng(99)
    with CheckpointWriter(folder, {"kind": "float", "config": CONFIG.to_dict()}) as writer:
        for part in CONFIG.part_names():
            parameters = random_parameters(CONFIG, part, seed=1, scale=0.15)
            for value in parameters.values():
                if part.startswith("layer") and value.ndim == 2:
                    value *= np.exp(generator.normal(0, 0.8, (value.shape[0], 1))).astype(np.float32)
            writer.write_part(part, parameters)
        writer.finish()


def load(folder: Path) -> Decoder:
    reader = CheckpointReader(folder)
    bits = reader.metadata.get("quantization", {}).get("activation_bits", 8)
    return Decoder.from_parameters(reader.config, reader.read_part, Execution(activation_bits=bits))


def sample_text(model: Decoder, sequences: int) -> np.ndarray:
    """int32 [sequences, LENGTH], drawn from the model's own distribution."""
    generator = np.random.default_rng(2)
    tokens = np.zeros((sequences, LENGTH), np.int32)
    tokens[:, 0] = generator.integers(0, CONFIG.vocab_size, sequences)
    logits_of = jax.jit(lambda model, tokens: model(tokens)[0])
    for position in range(1, LENGTH):
        logits = np.asarray(logits_of(model, tokens))[:, position - 1]
        tokens[:, position] = (logits + generator.gumbel(size=logits.shape)).argmax(axis=-1)
    return tokens


@pytest.fixture(scope="module")
def divergence(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Mean KL(float || quantised) of each setting."""
    folder = tmp_path_factory.mktemp("claims")
    write_float_model(folder / "float")
    model = load(folder / "float")
    text = sample_text(model, CALIBRATION_SEQUENCES + 16)
    calibration, held_out = text[:CALIBRATION_SEQUENCES], text[CALIBRATION_SEQUENCES:]
    predict = jax.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)[0]))
    reference = predict(model, held_out)
    scores: SalienceScores | None = None
    found = {}
    for name, settings in SETTINGS.items():
        scheme = QuantizationScheme(group_size=32, samples=CALIBRATION_SEQUENCES, sequence_length=LENGTH, **settings)
        reused = scores if scheme.needs_salience else None
        reader = CheckpointReader(folder / "float")
        quantize_checkpoint(reader, folder / name, scheme, calibration, salience=reused, show_progress=False)
        if scores is None:
            scores = SalienceScores.read(folder / name)
        logits = predict(load(folder / name), held_out)
        found[name] = float((jnp.exp(reference) * (reference - logits)).sum(axis=-1).mean())
    return found


def test_more_bits_are_better(divergence: dict[str, float]) -> None:
    assert divergence["W8A8"] < divergence["W4.8A8"] < divergence["W4.4A8"] < divergence["W4A8"]


def test_global_beats_per_layer_beats_random(divergence: dict[str, float]) -> None:
    assert divergence["W4.4A8"] < 0.8 * divergence["per-layer"]
    assert divergence["per-layer"] < 0.8 * divergence["random"]


def test_gptq_beats_rounding(divergence: dict[str, float]) -> None:
    assert divergence["W4A8"] < 0.8 * divergence["W4A8 rounding"]
    assert divergence["W4.4A8"] < 0.8 * divergence["W4.4A8 rounding"]


def test_int8_activations_cost_little_beside_4_bit_weights(divergence: dict[str, float]) -> None:
    assert divergence["W8A8"] < 0.2 * divergence["W4A8"]
    assert divergence["W4A8 rounding"] < 1.2 * divergence["W4A16 rounding"]
