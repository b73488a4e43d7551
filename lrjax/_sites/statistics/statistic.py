import operator

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ...linalg import eigh, nystrom, outer


class InputStatistic(eqx.Module):
    """What was summed over the inputs ``x (in,)`` of a layer; ``one + other`` is for all.

    Attributes:
        image: ``Σ x xᵀ (*b, in, in)``, or ``Σ x (xᵀ Ω) (*b, in, k)`` of a sketch; ``None``
            for a lookup, of which it is the diagonal matrix of ``total``.
        total: ``Σ x (*b, in)``; of a lookup, how often each entry was asked for.
        energy: ``Σ ‖x‖² (*b,)``.
        count: how many ``(*b,)``.
        probe: ``Ω (*b, in, k)`` with orthonormal columns, or ``None`` without a sketch.
        sensitivity: ``Σ g gᵀ (*b, out, out)`` over the gradients g with respect to what the
            layer gave, or ``None`` if it was not asked for.
    """

    image: Float[Array, "*b n k"] | None
    total: Float[Array, "*b n"]
    energy: Float[Array, "*b"]
    count: Float[Array, "*b"]
    probe: Float[Array, "*b n k"] | None = None
    sensitivity: Float[Array, "*b m m"] | None = None

    def __add__(self, other: "InputStatistic") -> "InputStatistic":
        layout = lambda one: jax.tree.map(jnp.shape, one)
        if layout(self) != layout(other):
            raise ValueError(
                f"Statistics of shapes {layout(self)} and {layout(other)} are not of one "
                "layer with one rank and key."
            )
        added = jax.tree.map(operator.add, self, other)
        return eqx.tree_at(
            lambda one: one.probe, added, self.probe, is_leaf=lambda x: x is None
        )

    def second_moment(self) -> Float[Array, "n n"]:
        """The mean of ``x xᵀ``, of one layer.

        Raises:
            ValueError: of a sketch, which does not have it.
        """
        sketched = self.image is not None and self.image.shape[-1] != len(self.total)
        if self.probe is not None or sketched:
            raise ValueError(
                "A sketch of the inputs does not hold their whole second moment: use "
                "activation_statistics without rank=."
            )
        image = jnp.diag(self.total) if self.image is None else self.image
        return image / self.count

    def mean(self) -> Float[Array, "*b n"]:
        """The mean of x."""
        return self.total / self.count[..., None]

    def principal(self) -> tuple[Float[Array, " k"], Float[Array, "n k"]]:
        """Variances of the inputs of one layer, falling, and their directions (columns)."""
        mean = self.mean()
        if self.probe is None or self.image is None:
            centred = self.second_moment() - outer(mean[:, None], mean[:, None])
            values, vectors = eigh(centred)
            return jnp.maximum(values[::-1], 0), vectors[:, ::-1]
        image = self.image / self.count
        centred = image - outer(mean[:, None], (mean @ self.probe)[:, None])
        return nystrom(centred, self.probe)

    def variance(self) -> Float[Array, "*b"]:
        """The total variance: the sum of those of all directions."""
        return self.energy / self.count - jnp.sum(self.mean() ** 2, axis=-1)
