import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from ..._batching import any_member
from ..._matrices import Rank, Side
from ..._sharding import placed_like
from .basis import MatrixBasis, RefreshContext


class Fixed(MatrixBasis):
    """A basis that never moves, given by the caller.

    Args:
        matrix: ``P (p, r)`` with orthonormal columns, for every projected leaf.
        side: the axis of the leaves that has length ``p``.

    Raises:
        ValueError: at ``init``, for a leaf whose projected axis is not ``p`` long.

    Example:
        >>> import jax.numpy as jnp, lrjax, optax
        >>> basis = lrjax.subspaces.Fixed(jnp.eye(16)[:, :4])
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis)
    """

    matrix: Float[Array, "p r"]
    _: dataclasses.KW_ONLY
    side: Side = "left"

    @property
    def rank(self) -> Rank:
        """The number of columns given, for leaves that fit."""
        size, columns = self.matrix.shape

        def checked(path: str, sides: tuple[int, int]) -> int:
            m, n = sides
            short, long = (m, n) if m <= n else (n, m)
            length = {"left": m, "right": n, "short": short, "long": long}[self.side]
            if length != size:
                raise ValueError(
                    f"Fixed was given a basis of {size} rows, and the {self.side} side of "
                    f"{path}, {m} × {n}, is {length} long: choose other leaves with "
                    "where=, or another side=."
                )
            return columns

        return checked

    def init(
        self, shape: tuple[int, ...], rank: int, dtype: Any, key: PRNGKeyArray
    ) -> Array:
        """The matrix itself, for every member of a stack."""
        del rank, key
        return jnp.broadcast_to(
            self.matrix.astype(dtype), (*shape[:-2], *self.matrix.shape)
        )

    def refresh(self, state: Array, a: Array, context: RefreshContext) -> Array:
        """What it was."""
        del a, context
        return state


class Switch(MatrixBasis):
    """One basis rule until step ``at``, another from then on.

    Args:
        before: the first rule.
        after: the second; rank and side are taken from the first.
        at: the step of the change; may be traced.

    Raises:
        ValueError: if either rule keeps a state of its own besides the basis matrix.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> basis = sub.Switch(sub.SVD(4), sub.RandomOrthonormal(4), at=1000)
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis)
    """

    before: MatrixBasis
    after: MatrixBasis
    at: ArrayLike

    def __check_init__(self):
        for rule in (self.before, self.after):
            if not isinstance(rule, MatrixBasis):
                raise ValueError(
                    "Switch needs two rules whose state is the basis matrix itself, got "
                    f"{type(rule).__name__}."
                )

    @property
    def rank(self) -> Rank:
        """That of the first rule."""
        return self.before.rank

    @property
    def side(self) -> Side:
        """That of the first rule."""
        return self.before.side

    @property
    def orthonormal(self) -> bool:
        """If both rules are."""
        return self.before.orthonormal and self.after.orthonormal

    def refresh(self, state: Array, a: Array, context: RefreshContext) -> Array:
        """By the rule whose turn it is."""
        late = any_member(context.count >= self.at)

        def turn(rule):
            return placed_like(rule.refresh(state, a, context).astype(state.dtype), state)

        return lax.cond(late, lambda: turn(self.after), lambda: turn(self.before))
