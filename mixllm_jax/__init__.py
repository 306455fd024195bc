"""MixLLM in JAX: mixed 4/8-bit post-training quantisation with fused GPU kernels."""
