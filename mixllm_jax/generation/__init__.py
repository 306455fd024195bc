"""Text generation: prefill, decode, sampling, streaming."""
