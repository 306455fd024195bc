"""The kernel on unsigned operands, for many tokens."""
