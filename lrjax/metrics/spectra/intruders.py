import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from ...linalg import cross, svd, working_dtype


def intruder_dimensions(
    base: Float[Array, "*batch m n"],
    tuned: Float[Array, "*c p q"],
    *,
    top: int = 10,
    threshold: ArrayLike = 0.5,
) -> Int[Array, "*batch"]:
    """How many leading singular vectors of a tuned weight have no counterpart before.

    A left singular vector among the first ``top`` of ``tuned`` intrudes if its largest
    absolute cosine with the left singular vectors of ``base`` is below the threshold.
    Costs two full SVDs a matrix: a thing to compute after training, not in its loop.

    Args:
        base: weights before tuning.
        tuned: weights after.
        top: how many leading vectors to look at; all of them if there are fewer.
        threshold: the cosine below which a vector counts.

    Returns:
        The counts, ``(*batch,)``.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> base = jnp.diag(jnp.arange(1.0, 10.0))
        >>> spread = jnp.ones((9, 1)) / 3  # a cosine of 1/3 with every vector of base
        >>> tuned = base + 500 * spread @ spread.T
        >>> int(lrjax.metrics.intruder_dimensions(base, tuned, top=1))
        1
        >>> int(lrjax.metrics.intruder_dimensions(base, 1.1 * base))
        0

    Reference:
        R. Shuttleworth, J. Andreas, A. Torralba, P. Sharma, "LoRA vs full fine-tuning: an
        illusion of equivalence" (2024), arXiv 2410.21228.
    """
    if base.shape != tuned.shape:
        raise ValueError(
            "intruder_dimensions needs two weights of one shape, got "
            f"{base.shape} and {tuned.shape}."
        )
    left = lambda w: svd(w.astype(working_dtype(w.dtype)))[0]
    cosines = jnp.abs(cross(left(tuned)[..., :top], left(base)))
    return jnp.sum(jnp.max(cosines, axis=-1) < threshold, axis=-1)
