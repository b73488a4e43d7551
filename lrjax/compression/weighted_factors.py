"""A weight in factors, its error weighed by what its inputs and outputs are."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from ..linalg import (
    cross,
    eigh,
    identity_like,
    nonzero,
    times,
    weighted_svd,
    working_dtype,
)
from ..lowrank import LowRank


class WeightedFactors(NamedTuple):
    """A weight as a sum of terms, those that matter most first; stacks allowed.

    Attributes:
        left: ``(*b, m, k)``.
        right: ``(*b, n, k)``; ``left @ right.T`` is the weight, where it is of use.
        values: ``(*b, k)``, falling: the weighed error of the first r terms is the root of
            the sum of squares of the other values.
        principal: ``(*b, n, n)``, principal directions of the inputs that :meth:`cut` is to
            project on, or ``None``.
    """

    left: Float[Array, "*b m k"]
    right: Float[Array, "*b n k"]
    values: Float[Array, "*b k"]
    principal: Float[Array, "*b n n"] | None = None

    def cut(self, rank: int, inputs: int | None = None) -> LowRank:
        """The first terms.

        Args:
            rank: how many.
            inputs: on how many principal directions of the inputs they are projected,
                ``rank`` by default; where there are fewer of these they are the width.

        Returns:
            The factors.

        Raises:
            ValueError: for a rank that is wider than the factors.
        """
        if not 1 <= rank <= self.left.shape[-1]:
            raise ValueError(
                f"cut needs a rank between 1 and {self.left.shape[-1]}, got {rank}."
            )
        left, right = self.left[..., :rank], self.right[..., :rank]
        if self.principal is None:
            return _evened(left, right)
        basis = self.principal[..., : rank if inputs is None else inputs]
        inside = cross(basis, right)
        if basis.shape[-1] < rank:
            return _evened(times(left, inside.mT), basis)
        return _evened(left, times(basis, inside))


def _evened(left: Array, right: Array) -> LowRank:
    """Factors whose columns are of one length on both sides."""
    length = lambda x: nonzero(jnp.sqrt(jnp.sum(x**2, axis=-2, keepdims=True)))
    ratio = jnp.sqrt(length(right) / length(left))
    return LowRank(left * ratio, right / ratio)


def weighted_factors(
    weight: Float[Array, "*b m n"],
    inputs: Array | None = None,
    outputs: Array | None = None,
    *,
    project_inputs: bool = False,
    damping: ArrayLike = 0.0,
) -> WeightedFactors:
    """The factors of a weight whose truncation has the least weighed error, at every rank.

    With ``C`` the second moment of the inputs and ``G`` that of the gradients at the
    outputs, the first r terms minimize ``tr(G E C Eᵀ)`` of the error ``E = W − X`` over all
    X of rank r. From ``G^½ W C^½ = P Σ Rᵀ`` they are::

        X = G^(−½) P_r P_rᵀ G^½ W

    Without G that is W behind the leading principal components of its outputs, the
    eigenvectors of ``W C Wᵀ``, and ``‖Σ_{>r}‖²`` is the mean squared error of the outputs;
    without either it is the truncated SVD. Inputs that C never saw are mapped as W maps
    them, projected alike: for them :func:`lrjax.linalg.weighted_svd` gives zero.

    W may be any matrix that inputs are multiplied with: of the residual ``W − Ŵ`` of a
    quantized or pruned weight the terms are the best low-rank correction. With the
    covariance in place of the second moment the bias takes ``E[(W − X) x]`` in addition,
    the error that all inputs share.

    Args:
        weight: ``(*b, m, n)``, outputs by inputs.
        inputs: C ``(*b, n, n)``, or its diagonal ``(*b, n)`` where inputs are one-hot;
            ``None`` for the identity.
        outputs: G ``(*b, m, m)``, or ``None`` for the identity.
        project_inputs: whether to project on the leading principal directions of the inputs
            too, ``P P_rᵀ W V_r V_rᵀ`` with the eigenvectors V of C, beside those of the
            outputs.
        damping: added to the diagonals of C and G, relative to their means. A little of it
            makes the factors of full rank exact where C is not of full rank.

    Returns:
        The factors at full width, in float32 or wider. Not differentiated through.

    Raises:
        ValueError: for weights of another size than that of ``weight``, or no inputs to
            project on.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> weight, x = jax.random.normal(jax.random.key(0), (2, 8, 8))
        >>> inputs = x @ jnp.diag(2.0 ** -jnp.arange(8)) @ x.T
        >>> error = lambda y: float(jnp.trace((weight - y) @ inputs @ (weight - y).T))
        >>> found = lrjax.compression.weighted_factors(weight, inputs)
        >>> plain = lrjax.truncate(weight, 3).materialize()
        >>> error(found.cut(3).materialize()) < 0.5 * error(plain)
        True
        >>> tail = float(sum(found.values[3:] ** 2))
        >>> abs(error(found.cut(3).materialize()) / tail - 1) < 0.01
        True

    Reference:
        A. Kaushal, T. Vaidhya, I. Rish, "LORD: low rank decomposition of monolingual code
        LLMs for one-shot compression" (2023), arXiv 2309.14021; Y. Yu et al., "Unified
        low-rank compression framework for click-through rate prediction" (2024), arXiv
        2405.18146, with the covariance and the bias; S.-Y. Liu et al., "EoRA:
        fine-tuning-free compensation for compressed LLM with eigenspace low-rank
        approximation" (2024), arXiv 2410.21271, of a residual; I. Garg, C. Koguchi,
        E. Verma, D. Ulbricht, "Revealing the utilized rank of subspaces of learning in
        neural networks" (2024), arXiv 2407.04797, with both projections.
    """
    w = lax.stop_gradient(weight).astype(working_dtype(weight.dtype))
    m, n = w.shape[-2:]
    moment = None if inputs is None else _metric("inputs", inputs, w, n, damping)
    metric = None if outputs is None else _metric("outputs", outputs, w, m, damping)
    scaled, right_metric = w, moment
    if moment is not None and moment.ndim < w.ndim:
        scaled, right_metric = w * jnp.sqrt(moment)[..., None, :], None
    found = weighted_svd(scaled, metric, right_metric, min(m, n))
    principal = None
    if project_inputs:
        if right_metric is None:
            raise ValueError("project_inputs needs the second moment of the inputs.")
        principal = eigh(right_metric)[1][..., ::-1]
    weighed = found.left if metric is None else times(metric, found.left)
    return WeightedFactors(found.left, cross(w, weighed), found.values, principal)


def _metric(name: str, c: Array, w: Array, size: int, damping: ArrayLike) -> Array:
    """A second moment, or the diagonal of one, for each of the weights, and damped."""
    diagonal = name == "inputs" and c.ndim == w.ndim - 1
    sides = (size,) if diagonal else (size, size)
    if c.ndim not in (w.ndim, w.ndim - diagonal) or c.shape[-len(sides) :] != sides:
        raise ValueError(
            f"weighted_factors of a weight {w.shape} needs {name} of shape "
            f"{(*w.shape[:-2], size, size)}, got {c.shape}."
        )
    c = jnp.broadcast_to(lax.stop_gradient(c), (*w.shape[:-2], *sides)).astype(w.dtype)
    damping = jnp.asarray(damping, c.dtype)
    if diagonal:
        return c + damping * jnp.mean(c, axis=-1, keepdims=True)
    mean = jnp.mean(jnp.diagonal(c, axis1=-2, axis2=-1), axis=-1)[..., None, None]
    return c + damping * mean * identity_like(c)
