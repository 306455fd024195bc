"""Speed and memory of generation, measured: `mixllm benchmark`."""
