"""RMSNorm, with or without a residual added before it, fused with the quantisation of its output."""
