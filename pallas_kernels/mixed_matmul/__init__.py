"""Product of int8 activations with a weight of 4-bit and 8-bit output channels."""
