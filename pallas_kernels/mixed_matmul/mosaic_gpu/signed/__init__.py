"""The kernel on signed operands."""
