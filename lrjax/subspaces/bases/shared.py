from typing import Any, Literal

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, PRNGKeyArray

from ..._matrices import Rank, Side
from ..._sharding import by_compiler, sharding_along
from .basis import Basis, Projector, RefreshContext


class Shared(Basis):
    """One basis for all matrices along a batch axis: the heads of a layer, its experts.

    ``"random"`` refreshes it from one member, drawn anew each time among those whose
    gradient is finite and not zero, for the price of one member. ``"all"`` refreshes it
    from all of them side by side, ``[a₁ … a_h] (p, h q)``.

    Args:
        base: the rule that finds the basis.
        axis: the batch axis, from the end: -3 is the last one. A leaf without batch axes
            keeps a basis of its own. Heads fused into one axis are cut apart by
            ``MatrixSpec(blocks=heads)``.
        choice: what the basis is found from.

    Raises:
        ValueError: for an axis of the matrices themselves, or an unknown choice.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> basis = sub.Shared(sub.RandomizedSVD(4))
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis)

    Reference:
        X. Liao, S. Li, Y. Xu, Z. Li, Y. Liu, Y. He, "GaLore+: boosting low-rank
        adaptation for LLMs with cross-head projection" (2024), arXiv 2412.19820.
    """

    base: Basis
    axis: int = -3
    choice: Literal["random", "all"] = "random"

    def __check_init__(self):
        if self.axis > -3:
            raise ValueError(
                f"Shared needs a batch axis counted from the end, got {self.axis}."
            )
        if self.choice not in ("random", "all"):
            raise ValueError(f"Shared takes choice 'random' or 'all', got {self.choice!r}.")

    @property
    def rank(self) -> Rank:
        """That of the base."""
        return self.base.rank

    @property
    def side(self) -> Side:
        """That of the base."""
        return self.base.side

    @property
    def orthonormal(self) -> bool:
        """If the base is."""
        return self.base.orthonormal

    @property
    def uses_momentum(self) -> bool:
        """If the base does."""
        return self.base.uses_momentum

    @property
    def has_start(self) -> bool:
        """If the base has."""
        return self.base.has_start

    @property
    def observes(self) -> bool:
        """If the base does."""
        return self.base.observes

    @property
    def shared_axis(self) -> int:
        """The axis given."""
        return self.axis

    def init(self, shape: tuple[int, ...], rank: int, dtype: Any, key: PRNGKeyArray) -> Any:
        """That of the base, for a shape with one member along the axis."""
        return self.base.init(shape, rank, dtype, key)

    def refresh(self, state: Any, a: Array, context: RefreshContext) -> Any:
        """By one member, or all."""
        return self.base.refresh(state, *self._as_one(a, context))

    def start(self, state: Any, a: Array, context: RefreshContext) -> Any:
        """By one member, or all."""
        return self.base.start(state, *self._as_one(a, context))

    def observe(self, state: Any, a: Array) -> Any:
        """All members side by side."""
        return self.base.observe(state, a if a.ndim < -self.axis else self._join(a))

    def changed_columns(self, count: Array, rank: int) -> tuple[Array, int] | None:
        """Those of the base."""
        return self.base.changed_columns(count, rank)

    def projector(
        self, state: Any, key: PRNGKeyArray, size: int, rank: int, on_rows: bool
    ) -> Projector:
        """That of the base: its batch axis of length one meets all members."""
        return self.base.projector(state, key, size, rank, on_rows)

    def _as_one(self, a: Array, context: RefreshContext) -> tuple[Array, RefreshContext]:
        if a.ndim < -self.axis:
            return a, context
        one = self._picker(a, context.key) if self.choice == "random" else self._join
        momentum, projected = (
            None if x is None else one(x) for x in (context.momentum, context.projected)
        )
        return one(a), context._replace(momentum=momentum, projected=projected)

    def _join(self, x: Array) -> Array:
        """All members side by side, as one matrix with many columns."""

        def join(x):
            x = jnp.moveaxis(x, self.axis, -2)
            return jnp.expand_dims(x.reshape(*x.shape[:-2], -1), self.axis)

        axis = x.ndim + self.axis
        kept = (None if k == axis else k for k in range(x.ndim - 1))
        return by_compiler(join, x, out=sharding_along(x, (*kept, None)))

    def _picker(self, a: Array, key: PRNGKeyArray):
        """One member of each group, the same one for the gradient and the momentum."""
        axis = a.ndim + self.axis
        energy = jnp.sum(a**2, axis=(-2, -1))
        scores = jr.uniform(key, energy.shape)
        scores = jnp.where(jnp.isfinite(energy) & (energy > 0), scores, -1)
        member = jnp.argmax(scores, axis=axis, keepdims=True)[..., None, None]
        pick = lambda x, member: jnp.take_along_axis(x, member, axis=axis)
        kept = lambda x: tuple(None if k == axis else k for k in range(x.ndim))
        return lambda x: by_compiler(pick, x, member, out=sharding_along(x, kept(x)))
