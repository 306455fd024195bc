"""Fixtures shared by all tests."""

import jax
import pytest


@pytest.fixture
def exact_matmul():
    """Full float32 products in XLA dots: a GPU rounds to TF32 by default, too coarse to compare with a reference."""
    with jax.default_matmul_precision("highest"):
        yield
