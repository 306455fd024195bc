"""The `mixllm` command line: one module a verb."""
