"""Perplexity and divergence from the float model."""
