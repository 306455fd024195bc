"""The kernel that splits the input channels, for few tokens."""
