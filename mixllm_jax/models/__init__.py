"""The decoder models and their configuration."""
