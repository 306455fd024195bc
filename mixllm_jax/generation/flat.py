"""Modules as the tuple of their arrays, which is how jitted functions are given them."""

from __future__ import annotations

import dataclasses
from typing import Any, Generic, TypeVar

import jax
from jaxtyping import Array

Tree = TypeVar("Tree")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flat(Generic[Tree]):
    """A tree of modules as the tuple of its arrays: walking through the modules would take Python milliseconds a call.

    Attributes:
        arrays: the leaves.
        structure: how they make the tree; static.
    """

    arrays: tuple[Array, ...]
    structure: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, tree: Tree) -> Flat[Tree]:
        """The arrays as they are now."""
        arrays, structure = jax.tree.flatten(tree)
        return cls(tuple(arrays), structure)

    def tree(self) -> Tree:
        """The inverse of `of`."""
        tree: Tree = jax.tree.unflatten(self.structure, self.arrays)
        return tree
