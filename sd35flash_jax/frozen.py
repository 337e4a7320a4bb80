"""Modules as compiled programs take them: flattened once, not at every call.

JAX flattens a program's arguments each time it is called. For an NNX module that is a walk through all of its
submodules in Python, which for a transformer takes longer than starting the program.
"""

from typing import Generic, TypeVar

import jax
from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)


@jax.tree_util.register_pytree_node_class
class Frozen(Generic[Module]):
    """A module's arrays and its structure; `module` puts them together again, within a program.

    `identity` says which module of which configuration it is, in words that mean the same in every process; with it,
    programs may be kept (`kept_programs`)."""

    def __init__(self, module: Module, identity: str | None = None):
        leaves, structure = jax.tree.flatten(module)
        self._leaves = tuple(leaves)
        self._structure = _STRUCTURES.setdefault((structure, identity), _Structure(structure, identity))

    @property
    def module(self) -> Module:
        return jax.tree.unflatten(self._structure.definition, self._leaves)

    @property
    def identity(self) -> str | None:
        return self._structure.identity

    def tree_flatten(self) -> tuple[tuple, "_Structure"]:
        return self._leaves, self._structure

    @classmethod
    def tree_unflatten(cls, structure: "_Structure", leaves: tuple) -> "Frozen[Module]":
        frozen = object.__new__(cls)
        frozen._structure, frozen._leaves = structure, leaves
        return frozen


class _Structure:
    """Equal to itself alone, so that programs are found without a comparison of structures."""

    def __init__(self, definition: jax.tree_util.PyTreeDef, identity: str | None):
        self.definition = definition
        self.identity = identity


_STRUCTURES: dict[tuple[jax.tree_util.PyTreeDef, str | None], _Structure] = {}
