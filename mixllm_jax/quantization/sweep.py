"""Phase 3: quantises the weights of the blocks in order, each calibrated through the quantised blocks before it.

Within a block, too, each linear sees what the quantised linears before it give, int8 activations included. A finished
block is a checkpoint part; the next block's input is stored before the part is written, so a killed run goes on with
the first block whose part is missing.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixllm_jax.checkpoint import CheckpointWriter
from mixllm_jax.errors import MixLLMError
from mixllm_jax.models.config import LINEAR_NAMES, LINEAR_PATHS, layer_part_name
from mixllm_jax.quantization import block_passes
from mixllm_jax.quantization.activation_store import ActivationStore
from mixllm_jax.quantization.hessian import HessianSum
from mixllm_jax.quantization.packed import pack_for_calibration, pack_weight
from mixllm_jax.quantization.pieces import Rounding, gptq_weight
from mixllm_jax.quantization.progress import Progress
from mixllm_jax.quantization.rounding import round_to_nearest
from mixllm_jax.quantization.runtime import StreamedModel
from mixllm_jax.quantization.scheme import QuantizationScheme
from pallas_kernels.packing import PackedWeight

_ROUNDING_COST, _GPTQ_COST = 0.5, 6.0

EightBitMasks = Mapping[tuple[int, str], np.ndarray]
"""For each (layer, linear): bool [out_features], true where a channel gets 8 bits."""


def sweep_cost(num_layers: int, method: str) -> float:
    """Work of the whole phase in units of :class:`~mixllm_jax.quantization.progress.Progress`."""
    return num_layers * _block_cost(method)


def _block_cost(method: str) -> float:
    return _GPTQ_COST if method == "gptq" else _ROUNDING_COST


def quantize_blocks(
    model: StreamedModel,
    scheme: QuantizationScheme,
    eight_bit: EightBitMasks,
    writer: CheckpointWriter,
    progress: Progress,
    quantize_weight: Rounding = gptq_weight,
) -> None:
    """Writes the quantised part of every block that ``writer`` does not have yet.

    Raises:
        MixLLMError: weights or activations are not finite.
    """
    num_layers = model.config.num_layers
    for layer in range(num_layers):
        part = layer_part_name(layer)
        if writer.has_part(part):
            progress.skip(_block_cost(scheme.method))
            continue
        progress.describe(f"quantizing block {layer + 1}/{num_layers}")
        parameters = model.read_layer(layer)
        _check_finite(model, layer, parameters)
        masks = {name: eight_bit[layer, name] for name in LINEAR_NAMES}
        if scheme.method == "gptq":
            packed = _calibrated_block(model, scheme, layer, parameters, masks, writer, quantize_weight)
        else:
            packed = {
                name: pack_weight(_round(jnp.asarray(parameters[_weight_path(name)]), mask, scheme.group_size))
                for name, mask in masks.items()
            }
        writer.write_part(part, parameters | {_weight_path(name): weight for name, weight in packed.items()})
        if scheme.method == "gptq":
            _store(model, writer).delete(_input(layer))
        progress.advance(_block_cost(scheme.method))


_round = jax.jit(round_to_nearest, static_argnums=2)


def _check_finite(model: StreamedModel, layer: int, parameters: Mapping[str, Any]) -> None:
    for path, value in parameters.items():
        if not np.isfinite(value.astype(np.float32)).all():
            raise MixLLMError(
                f"{model.reader.path}: {path} of block {layer} holds values that are not finite: the model is damaged, "
                "convert it again"
            )


def _weight_path(linear: str) -> str:
    return f"{LINEAR_PATHS[linear]}.weight"


def _input(layer: int) -> str:
    return f"quantized_input_{layer:04d}"


def _store(model: StreamedModel, writer: CheckpointWriter) -> ActivationStore:
    return ActivationStore(writer.work_dir, jnp.dtype(model.runtime.dtype))


def _calibrated_block(
    model: StreamedModel,
    scheme: QuantizationScheme,
    layer: int,
    parameters: dict[str, Any],
    masks: Mapping[str, np.ndarray],
    writer: CheckpointWriter,
    quantize_weight: Rounding,
) -> dict[str, PackedWeight]:
    """Quantises the four linears of a block one after the other and stores the block's output."""
    store, batch, rotary = _store(model, writer), model.runtime.batch, model.rotary()
    if layer == 0:
        embedding = model.embedding()
        embedded = (np.asarray(block_passes.embed(embedding, tokens)) for tokens in model.token_batches())
        store.write(_input(0), model.hidden_shape(), embedded)
    block = model.block(layer, parameters, scheme.activation_bits)
    calibrated = dict(parameters)
    packed: dict[str, PackedWeight] = {}

    def quantize(name: str, hessian: HessianSum) -> None:
        nonlocal block
        weight = jnp.asarray(parameters[_weight_path(name)])
        try:
            result = quantize_weight(weight, hessian.mean(), masks[name], scheme.group_size)
        except FloatingPointError as error:
            raise MixLLMError(f"{model.reader.path}: block {layer}, {name}: {error}") from error
        packed[name] = pack_weight(result)
        calibrated[_weight_path(name)] = pack_for_calibration(result)
        block = model.block(layer, calibrated, scheme.activation_bits)

    hessian = HessianSum(model.config.linear_shape("qkv_proj")[1])
    for x in store.read(_input(layer), batch):
        hessian.add(block_passes.linear_input(block, x, rotary, "qkv_proj"))
    quantize("qkv_proj", hessian)

    # Attention is the only part that is not cheap to compute again: its output is kept, on the host.
    hessian = HessianSum(model.config.linear_shape("o_proj")[1])
    attention: list[np.ndarray] = []
    for x in store.read(_input(layer), batch):
        mixed = block_passes.linear_input(block, x, rotary, "o_proj")
        hessian.add(mixed)
        attention.append(np.asarray(mixed))
    quantize("o_proj", hessian)
    attention = [np.asarray(block_passes.apply_linear(block.attention.o_proj, mixed)) for mixed in attention]

    for name in ("gate_up_proj", "down_proj"):
        hessian = HessianSum(model.config.linear_shape(name)[1])
        for x, output in zip(store.read(_input(layer), batch), attention, strict=True):
            hessian.add(block_passes.linear_input(block, x, rotary, name, output))
        quantize(name, hessian)

    if layer + 1 < model.config.num_layers:
        outputs = (
            np.asarray(block_passes.block_output(block, x, rotary, output))
            for x, output in zip(store.read(_input(layer), batch), attention, strict=True)
        )
        store.write(_input(layer + 1), model.hidden_shape(), outputs)
    return packed
