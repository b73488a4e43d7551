"""Gradients from losses alone, along random directions of a subspace."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, PyTree, Scalar

from ..._arguments import check_key, check_parameters
from ..._matrices import Where
from ...linalg import working_dtype
from ..bases import Basis
from ._directions import directions
from .affine_subspace import AffineSubspace


def zeroth_order_gradient(
    loss: Callable[..., Scalar],
    params: PyTree,
    *args: Any,
    key: PRNGKeyArray,
    subspace: Basis | tuple[Basis, Basis] | AffineSubspace | None = None,
    queries: int = 1,
    scale: ArrayLike = 1e-3,
    ranked: bool = False,
    count: ArrayLike = 0,
    period: ArrayLike = 1,
    where: Where | None = None,
    densify: bool = True,
) -> tuple[Float[Array, ""], PyTree]:
    """Estimate a gradient from values of the loss, along random directions of a subspace.

    With normal coordinates ``ξ_k ~ N(0, I)`` of a subspace with basis P and ``ε = scale``,
    the mean over the queries of two-point differences::

        ĝ = 1/q Σ_k (loss(θ + ε P ξ_k) − loss(θ − ε P ξ_k)) / (2 ε) · P ξ_k

    For small ε its mean is ``P Pᵀ g``, and of d orthonormal columns ``E ‖ĝ − P Pᵀ g‖² =
    (d + 1)/q ‖P Pᵀ g‖²``: noise of the size of the subspace, not of the model. No
    derivative of the loss is taken, so that it may have steps in it.

    Perturbations are drawn again from their keys wherever they are needed, and one model
    at a time is perturbed: under ``jit`` a step takes the memory of one evaluation of the
    loss, and the sum over queries is one of coordinates.

    The subspace is one of:

    - ``None``: all parameters, as in MeZO;
    - a basis of each matrix, ``Gaussian(r, side="right")`` for the perturbations
      ``U Vᵀ`` of LOZO, or ``RandomOrthonormal``, ``SelectedRows(choice="uniform")``;
    - two of them, ``(RandomOrthonormal(r), RandomOrthonormal(r))``, of its rows and its
      columns: ``Q Ξ Pᵀ``, as in SubZero;
    - a :class:`AffineSubspace` of all parameters together.

    ``count`` numbers the steps: perturbations differ in each, bases in every
    ``period``-th; nothing is stored. In between, an optimizer can keep its moments in the
    coordinates, :func:`lrjax.project_updates`.

    With ``ranked`` only the order of the losses counts: ``loss(θ + ε P ξ_k)`` is compared
    with all others, and ::

        ĝ = 2/(q (q − 1)) Σ_k (number of larger ones below − of smaller ones above) · P ξ_k

    that is the difference of the two perturbations, uphill, averaged over all pairs. It is
    the same for every increasing function of the loss. Its length is no gradient's: of a
    linear loss its mean is ``2/√π`` long, in coordinates.

    Args:
        loss: ``loss(params, *args)``, a number.
        params: a tree of floating-point arrays.
        *args: data, passed on.
        key: that of the run; the same one in every step.
        subspace: where perturbations lie, as above.
        queries: how many perturbations q; two values of the loss for each, one if ranked.
        scale: ε. Normal numbers times it are added to the coordinates. Perturbations in
            two orthonormal bases are shorter than those of all m × n numbers by
            ``r/√(mn)``; a larger scale makes up for it.
        ranked: whether only the order of the losses is used.
        count: the number of this step.
        period: how many steps a basis serves.
        where: the leaves that a basis is for; see :func:`lrjax.project_updates`. The others
            are perturbed in all numbers.
        densify: if False, the gradients of those leaves are left as
            :class:`~lrjax.LowRank` nodes, of the matrices as ``where`` sees them.

    Returns:
        The mean of the losses that were taken, and a tree like ``params``.

    Raises:
        TypeError: for parameters that are no floating-point arrays, or another subspace.
        ValueError: for no queries, less than two that are ranked, a loss that is no number,
            or a :class:`AffineSubspace` of other parameters.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> loss = lambda w: jnp.mean(jnp.abs(w - 1))
        >>> w, tx = jnp.zeros((16, 8)), optax.sgd(0.3)
        >>> basis = lrjax.subspaces.Gaussian(2, side="right")
        >>> @jax.jit
        ... def step(w, state, count):
        ...     value, grad = lrjax.zeroth_order_gradient(
        ...         loss, w, key=jax.random.key(0), subspace=basis, count=count, period=10)
        ...     updates, state = tx.update(grad, state)
        ...     return optax.apply_updates(w, updates), state
        >>> state = tx.init(w)
        >>> for count in range(100):
        ...     w, state = step(w, state, count)
        >>> print(loss(w) < 0.8)
        True

    Reference:
        S. Malladi et al., "Fine-tuning language models with just forward passes" (2023),
        arXiv 2305.17333 (MeZO); Y. Chen et al., "Enhancing zeroth-order fine-tuning for
        language models with low-rank structures" (2024), arXiv 2410.07698 (LOZO; the
        authors' code takes ``scale/√r`` for the scale and r times the gradient); Z. Yu et
        al., "SubZero: random subspace zeroth-order optimization for memory-efficient LLM
        fine-tuning" (2024), arXiv 2410.08989 (their code multiplies the perturbation by
        ``√(mn)/r``); Z. Tang, D. Rybin, T.-H. Chang, "Zeroth-order optimization meets human
        feedback: provable learning via ranking oracles" (2023), arXiv 2303.03751 (ranked).
    """
    name = "zeroth_order_gradient"
    check_key(name, key)
    check_parameters(name, params)
    if queries < 1 + ranked:
        raise ValueError(
            f"{name} needs at least {1 + ranked} queries{' to rank' * ranked}, got "
            f"{queries}."
        )
    draws, bases = jr.split(key)
    space = directions(
        params, subspace, jr.fold_in(bases, jnp.asarray(count) // period), where
    )
    keys = jr.split(jr.fold_in(draws, count), queries)
    signs = jnp.array([1.0] if ranked else [1.0, -1.0])

    def value_at(k: Array) -> Array:
        query, way = k // signs.size, k % signs.size
        moved = space.moved(keys[query][None], (signs[way] * scale)[None])
        value = jnp.asarray(loss(moved, *args))
        if jnp.shape(value):
            raise ValueError(f"{name} needs a loss that is a number, got {value.shape}.")
        return value.astype(working_dtype(value.dtype))

    # In a loop: the loss is compiled once, and one perturbed model is there at a time.
    values = lax.map(value_at, jnp.arange(queries * signs.size))
    slopes = _ranks(values) if ranked else values[::2] - values[1::2]
    slopes = slopes / (queries * ((queries - 1) / 2 if ranked else 2 * scale))
    total = space.draw(keys, slopes)
    grads = space.lift(total) if densify else space.factors(total)
    cast = lambda p, g: jax.tree.map(lambda x: x.astype(p.dtype), g)
    return jnp.mean(values), jax.tree.map(cast, params, grads)


def _ranks(values: Float[Array, " q"]) -> Int[Array, " q"]:
    """How many of the others are smaller, less how many are larger; NaN is neither."""
    mine, others = values[:, None], values[None, :]
    return jnp.sum((mine > others).astype(jnp.int32) - (mine < others), axis=1)
