"""SwiGLU fused with the quantisation of its output."""
