"""The operations of MixLLM on arrays, each with an XLA reference and GPU kernels."""

from pallas_kernels.activations import QuantizedActivations
from pallas_kernels.decode_attention.api import decode_attention
from pallas_kernels.kv_cache import LayerCache
from pallas_kernels.mixed_matmul.api import activation_layout, mixed_matmul, prepare_weight, quantized_linear
from pallas_kernels.packing import PackedWeight
from pallas_kernels.quantize_activations.api import quantize_activations
from pallas_kernels.rms_norm_quantize.api import rms_norm_quantize
from pallas_kernels.swiglu_quantize.api import swiglu_quantize

__all__ = [
    "LayerCache",
    "PackedWeight",
    "QuantizedActivations",
    "activation_layout",
    "decode_attention",
    "mixed_matmul",
    "prepare_weight",
    "quantize_activations",
    "quantized_linear",
    "rms_norm_quantize",
    "swiglu_quantize",
]
