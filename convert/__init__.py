"""Converters from Hugging Face and GGUF checkpoints."""
