import abc
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..lowrank import LowRank
from ._sites import replace_matrix


class Adapter(eqx.Module):
    """A change of one weight matrix: what every kind of adapter can do.

    An adapter holds arrays only and lives outside the model. It sees each weight as a
    matrix ``(*b, out, in)``: a convolution kernel with its input axes flattened, an
    embedding table transposed, ``*b`` the axes of layers stacked for ``lax.scan``.

    Kinds that are not additive (a magnitude, a product, a rotation) only write
    ``weight``; kinds with a cheap low-rank path write ``apply`` as well.
    """

    @abc.abstractmethod
    def weight(
        self, base: Float[Array, "*b out in"], shared: PyTree = None
    ) -> Float[Array, "*b out in"]:
        """The whole adapted weight (not the change), in the dtype of ``base``."""

    @abc.abstractmethod
    def trainable(self) -> PyTree:
        """A tree of this structure: which leaves the optimizer sees."""

    def apply(
        self, layer: Any, x: Array, shared: PyTree = None, key: PRNGKeyArray | None = None
    ) -> Array:
        """What the adapted layer gives for one input; by default by its dense weight."""
        del key
        return replace_matrix(layer, lambda base: self.weight(base, shared))(x)

    def factors(self) -> tuple[LowRank, Array] | None:
        """The change as ``(pair, scale)`` if it is ``scale · left @ right.T``."""
        return None

    def rebase(self, base: Float[Array, "*b out in"]) -> Float[Array, "*b out in"]:
        """What is left of the weight after the part that the adapter took out."""
        return base


class AdapterKind(eqx.Module):
    """The recipe of an adapter: hyper-parameters, and how to build one for a matrix."""

    @abc.abstractmethod
    def init(
        self,
        base: Float[Array, "*b out in"],
        *,
        key: PRNGKeyArray,
        lookup: bool = False,
        shared: PyTree = None,
    ) -> Adapter:
        """An adapter for one matrix; ``lookup`` if its input is an index (embedding)."""

    def init_shared(
        self, bases: dict[str, jax.ShapeDtypeStruct], *, key: PRNGKeyArray
    ) -> PyTree:
        """The pool that all adapters of one call share; by default there is none."""
        del bases, key
