"""The operations of MixLLM on arrays, each with an XLA reference and GPU kernels."""
