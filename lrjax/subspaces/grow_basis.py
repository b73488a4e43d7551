import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int

from ..linalg import orthonormalize, outer, rounding, svd, times


def grow_basis(
    basis: Float[Array, "n k"], inputs: Float[Array, "samples n"], energy: ArrayLike
) -> Float[Array, "n k"]:
    """Add to a basis the fewest directions that capture so much of the energy of data.

    What the basis leaves out of the inputs, ``X − X M Mᵀ``, has the singular values
    ``σ_i``; its leading right singular vectors are added until ``‖X M‖² ≥ energy ·
    ‖X‖²``. The basis has room for ``k`` directions, zero columns standing for those
    still free, so that its shape never changes; when it is full the rest is dropped.

    Of whole models :class:`lrjax.continual.InputBases` does so, and says what was dropped.

    Args:
        basis: ``M``, orthonormal columns and then zeros.
        inputs: ``X``, what a layer was fed on a sample of a task, a row each.
        energy: the share to capture, in [0, 1].

    Returns:
        The grown basis, for :func:`lrjax.project_out`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = jnp.array([[0.0, 3.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.1]])
        >>> print(abs(lrjax.subspaces.grow_basis(jnp.zeros((3, 3)), x, 0.99)))
        [[1. 0. 0.]
         [0. 1. 0.]
         [0. 0. 0.]]

    Reference:
        G. Saha, I. Garg, K. Roy, "Gradient projection memory for continual learning"
        (2021), arXiv 2103.09762.
    """
    x = lax.stop_gradient(inputs).astype(basis.dtype)
    rest = x
    for _ in range(2):  # the second time takes what rounding left of the first
        rest = rest - outer(times(rest, basis), basis)
    _, values, vectors = svd(rest)
    total = jnp.sum(x**2)
    missing = jnp.sum(values**2) - jnp.cumsum(values**2) + values**2  # before each one
    # What rounding leaves of inputs that are in the basis is no direction of theirs.
    noise = rounding(x.dtype, len(basis)) * jnp.sqrt(total)
    wanted = (missing > (1 - energy) * total) & (values > noise)
    return append_directions(basis, vectors.T, jnp.sum(wanted))


def append_directions(
    basis: Float[Array, "n k"], directions: Float[Array, "n s"], count: Int[Array, ""]
) -> Float[Array, "n k"]:
    """Put the first directions into the free columns of a basis, orthonormal to it.

    The columns that are there are not touched. Each new one is orthogonal to all before it
    to rounding, so that nothing drifts however often it is done.

    Args:
        basis: ``M``, orthonormal columns and then zeros, which stand for free ones.
        directions: the first ``count`` of them linearly independent, of each other and of
            the basis.
        count: how many are put in; those without room are dropped, the last ones first.

    Returns:
        The basis in the same shape.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> basis = jnp.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
        >>> new = jnp.array([[1.0], [2.0], [0.0]])
        >>> print(abs(lrjax.subspaces.append_directions(basis, new, jnp.array(1))))
        [[1. 0.]
         [0. 1.]
         [0. 0.]]
    """
    n, k = basis.shape
    new = directions[:, : min(n, k)].astype(basis.dtype)
    index = jnp.arange(new.shape[1])
    new = jnp.where(index[None] < count, new, 0)
    new = orthonormalize(new, against=basis)
    used = jnp.sum(jnp.any(basis != 0, axis=0))
    slots = jnp.where(index < count, used + index, k)
    return basis.at[:, slots].set(new, mode="drop")
