import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ...linalg import gram, identity_like, working_dtype
from ...lowrank import is_low_rank


def orthogonality(params: PyTree) -> Float[Array, ""]:
    """How far the factors of pairs are from orthonormal columns, a term for a loss.

    The mean of ``‖FᵀF − I‖_F`` over both factors ``F`` of every pair, ``B (out, r)`` and
    ``Aᵀ (in, r)``, layers of a stack apart.

    Args:
        params: a tree with LowRank nodes, as from :func:`lrjax.partition`.

    Returns:
        A number; times 0.5 in the loss by PEFT's default, times 0.1 in the paper's code.

    Raises:
        ValueError: for a tree without pairs.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> pair = lrjax.LowRank(jnp.eye(4)[:, :2], 2 * jnp.eye(3)[:, :2])
        >>> print(lrjax.adapters.orthogonality({"w": pair}).round(4))  # (0 + 3 √2) / 2
        2.1213

    Reference:
        Q. Zhang et al., "AdaLoRA: adaptive budget allocation for parameter-efficient
        fine-tuning" (2023), arXiv:2303.10512.
    """
    nodes = [x for x in jax.tree.leaves(params, is_leaf=is_low_rank) if is_low_rank(x)]
    factors = [factor for node in nodes for factor in (node.left, node.right)]
    if not factors:
        raise ValueError(
            "orthogonality found no lrjax.LowRank node: give it the params of "
            "lrjax.partition, or any tree with pairs."
        )
    distances = [_distance(factor).ravel() for factor in factors]
    return jnp.mean(jnp.concatenate(distances))


def _distance(factor: Float[Array, "*b n r"]) -> Float[Array, "*b"]:
    factor = factor.astype(working_dtype(factor.dtype))
    product = gram(factor)
    square = jnp.sum((product - identity_like(product)) ** 2, axis=(-2, -1))
    # A root has no derivative at zero; here it has a finite one.
    return jnp.sqrt(square + jnp.finfo(square.dtype).tiny)
