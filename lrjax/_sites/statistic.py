import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..linalg import eigh, nystrom, outer


class InputStatistic(eqx.Module):
    """What was summed over the inputs ``x (in,)`` of a layer; ``one + other`` is for all.

    Attributes:
        image: ``Σ x xᵀ (*b, in, in)``, or ``Σ x (xᵀ Ω) (*b, in, k)`` of a sketch.
        total: ``Σ x (*b, in)``.
        energy: ``Σ ‖x‖² (*b,)``.
        count: how many ``(*b,)``.
        probe: ``Ω (*b, in, k)`` with orthonormal columns, or ``None`` without a sketch.
    """

    image: Float[Array, "*b n k"]
    total: Float[Array, "*b n"]
    energy: Float[Array, "*b"]
    count: Float[Array, "*b"]
    probe: Float[Array, "*b n k"] | None = None

    def __add__(self, other: "InputStatistic") -> "InputStatistic":
        if (self.probe is None) != (other.probe is None) or (
            self.image.shape != other.image.shape
        ):
            raise ValueError(
                f"Statistics of shapes {self.image.shape} and {other.image.shape} are not "
                "of one layer with one rank and key."
            )
        return InputStatistic(
            self.image + other.image,
            self.total + other.total,
            self.energy + other.energy,
            self.count + other.count,
            self.probe,
        )

    def second_moment(self) -> Float[Array, "n n"]:
        """The mean of ``x xᵀ``, of one layer.

        Raises:
            ValueError: of a sketch, which does not have it.
        """
        if self.probe is not None:
            raise ValueError(
                "A sketch of the inputs does not hold their whole second moment: use "
                "activation_statistics without rank=."
            )
        return self.image / self.count

    def principal(self) -> tuple[Float[Array, " k"], Float[Array, "n k"]]:
        """Variances of the inputs of one layer, falling, and their directions (columns)."""
        mean, image = self.total / self.count, self.image / self.count
        if self.probe is None:
            values, vectors = eigh(image - outer(mean[:, None], mean[:, None]))
            return jnp.maximum(values[::-1], 0), vectors[:, ::-1]
        centred = image - outer(mean[:, None], (mean @ self.probe)[:, None])
        return nystrom(centred, self.probe)

    def variance(self) -> Float[Array, "*b"]:
        """The total variance: the sum of those of all directions."""
        mean = self.total / self.count[..., None]
        return self.energy / self.count - jnp.sum(mean**2, axis=-1)
