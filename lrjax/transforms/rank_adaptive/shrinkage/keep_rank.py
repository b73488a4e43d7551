import numbers

import optax

from ...._arguments import checks_trees
from ...._matrices import Where, check_real
from ...._tree import check_params
from ...wrappers.on_matrices import check_chosen, on_matrices
from .._factors import ending_at


@checks_trees
def keep_rank(rank: int, *, where: Where | None = None) -> optax.GradientTransformation:
    """Hard thresholding of singular values: steps end at the nearest matrix of a rank.

    For the step ``U`` that reaches it and a matrix ``W``::

        W ← Π_r(W + U),  Π_r(P diag(σ) Qᵀ) = Σ_{i ≤ r} σ_i p_i q_iᵀ

    It stands at the end of a chain. After ``optax.sgd`` it is iterative hard thresholding,
    or singular value projection, the dense method that steps on factors are measured by;
    with a constraint in between, any transform that ends in its set, it is the low-rank
    projected gradient of supervised dictionary learning. One SVD of each matrix a step.

    Args:
        rank: r, at least 1; of matrices with a shorter side nothing is cut.
        where: which leaves, and which axes are rows; see
            :func:`lrjax.transforms.on_matrices`. The others are not cut.

    Returns:
        A stateless optax transform.

    Raises:
        ValueError: for a rank below 1; at ``init``, if ``where`` chooses no leaf, or one
            that is no matrix; at ``update``, if no params are given.

    Example:
        A matrix of rank one, of which half the entries are seen:

        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> truth = jnp.outer(jnp.arange(1.0, 7.0), jnp.arange(1.0, 6.0))
        >>> seen = jax.random.bernoulli(jax.random.key(0), 0.6, truth.shape)
        >>> loss = lambda x: jnp.sum(seen * (x - truth) ** 2) / 2
        >>> cut = lrjax.keep_rank(1, where=lambda path, shape: True)
        >>> tx = optax.chain(optax.sgd(1.0), cut)
        >>> x = jnp.zeros((6, 5))
        >>> state = tx.init(x)
        >>> for _ in range(60):
        ...     updates, state = tx.update(jax.grad(loss)(x), state, x)
        ...     x = optax.apply_updates(x, updates)
        >>> bool(jnp.linalg.norm(x - truth) < 1e-2 * jnp.linalg.norm(truth))
        True

    Reference:
        P. Jain, R. Meka, I. Dhillon, "Guaranteed rank minimization via singular value
        projection" (2009), arXiv 0909.5457; with a constraint: J. Lee, H. Lyu, W. Yao,
        "Supervised dictionary learning with auxiliary covariates" (2022), arXiv 2206.06774.
        Special case: at full rank nothing is changed.
    """
    if not isinstance(rank, numbers.Integral) or rank < 1:
        raise ValueError(f"keep_rank needs a rank of at least 1, got {rank!r}.")

    def init(params):
        check_real("keep_rank", params)
        check_chosen("keep_rank", params, where)
        return optax.EmptyState()

    def update(updates, state, params=None):
        check_params("keep_rank", params)
        cut = lambda values: values.at[..., rank:].set(0)
        return on_matrices(ending_at(cut), where)(updates, params), state

    return optax.GradientTransformation(init, update)
