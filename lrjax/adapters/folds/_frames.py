"""The frames in which gradients of factors are seen, and how they change at a fold."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._moments import Moments
from ...linalg import cross, inverse_gram, nonzero, outer, times, working_dtype
from ..kinds.factors import Factors
from ..protocol import Adapter, Adapters, map_adapters
from ._parts import over_parts


@dataclasses.dataclass(frozen=True)
class Frame:
    """How a gradient ``G P (k, r)`` changes with its frame ``P (n, r)``.

    Attributes:
        overlap: ``C = P_newᵀ P_old (P_oldᵀ P_old)⁻¹``.
        entering: the squared length of each new direction outside of the old span.
        weights: ``1 / (r ‖p_j‖²)`` of the old directions, whose weighted sum is a mean.
    """

    overlap: Float[Array, "*b r r"]
    entering: Float[Array, "*b r"]
    weights: Float[Array, "*b r"]

    def moved(self, moments: Moments) -> Moments:
        """The moments in the new frame."""
        first, second = moments.first, moments.second
        if first is not None:
            first = outer(first, self.overlap.astype(first.dtype))
        if second is not None:
            inside = outer(second, (self.overlap**2).astype(second.dtype))
            mean = jnp.sum(second * self.weights[..., None, :], axis=-1, keepdims=True)
            outside = mean * self.entering[..., None, :]
            second = inside + outside.astype(second.dtype)
        return moments._replace(first=first, second=second)


class Same:
    """No change of frame: for numbers that are seen in the weight's own axes."""

    def moved(self, moments: Moments) -> Moments:
        """The moments as they are."""
        return moments


def frames_of(old: Adapters, new: Adapters) -> Adapters:
    """What the moments of each number go through, in the place of the number.

    Raises:
        ValueError: by path, for adapters whose numbers are no factors.
    """
    if any(jax.tree.leaves(eqx.filter(p, p.trainable())) for p in new.pools.values()):
        raise ValueError(
            f"The pools {sorted(new.pools)} are trained, and RotateMoments knows the "
            "frames of factors that belong to one weight alone: use ResetMoments."
        )

    def change(path: str, was: Adapter, now: Adapter) -> Any:
        def inner(was: Any, now: Any) -> Any:
            if not isinstance(was, Factors) or was.gate is not None or was.thinning:
                raise ValueError(
                    f"The adapter at {path!r} is a {type(was).__name__} that is no plain "
                    "product of two factors, whose moments RotateMoments cannot carry "
                    "over: use ResetMoments or PruneMoments."
                )
            both = lambda own: (own.pair.left, own.pair.right)
            return eqx.tree_at(both, _unmoved(now), _changes(was, now))

        return over_parts(inner, lambda _, now: _unmoved(now), was, now)

    return map_adapters(change, old, new)


def _unmoved(adapter: Adapter) -> Any:
    return jax.tree.map(lambda _: Same(), adapter)


def _changes(old: Factors, new: Factors) -> tuple[Frame, Frame]:
    """Of the left factor, which is seen through the right one, and the other way round."""
    of_left = _change(_frame(old, old.pair.right), _frame(new, new.pair.right))
    of_right = _change(_frame(old, old.pair.left), _frame(new, new.pair.left))
    return of_left, of_right


def _frame(own: Factors, partner: Array) -> Float[Array, "*b n r"]:
    """What a gradient with respect to the weight is multiplied with."""
    weights = own.factors()[1][..., None]
    weights = weights if own.mask is None else weights * own.mask
    wide = partner.astype(working_dtype(partner.dtype))
    return wide * weights.astype(wide.dtype)[..., None, :]


def _change(old: Float[Array, "*b n r"], new: Float[Array, "*b n r"]) -> Frame:
    overlap = times(cross(new, old), inverse_gram(old))
    seen = jnp.sum(times(old, overlap.mT) ** 2, axis=-2)
    entering = jnp.maximum(jnp.sum(new**2, axis=-2) - seen, 0)
    sizes = jnp.sum(old**2, axis=-2)
    there = jnp.where(sizes > 0, 1.0, 0.0)
    count = nonzero(jnp.sum(there, axis=-1, keepdims=True))
    return Frame(overlap, entering, there / nonzero(sizes) / count)
