import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..._arguments import check_key
from ..._sites import Axes, Where, check_repeatable, summed
from ...linalg import orthonormalize, working_dtype
from ...lowrank import LowRank
from ..binding import adapt, bind
from ..kinds import Factors, FullCopy
from ..protocol import AdapterKind, Adapters, map_adapters, partition


def gradient_statistics(
    loss: Callable[[PyTree, Any], Float[Array, ""]],
    model: PyTree,
    batches: Iterable[Any],
    *,
    where: Where = None,
    axes: Axes | None = None,
    rank: int | None = None,
    power_iters: int = 1,
    key: PRNGKeyArray | None = None,
) -> dict[str, Any]:
    """The mean gradient over some batches with respect to each matrix, whole or in factors.

    Without a rank, ``G (out, in)`` of all matrices at once, in float32: as much memory as
    their weights. With one, ``G ≈ Q (Gᵀ Q)ᵀ`` by subspace iteration: the gradient with
    respect to thin factors beside the weights is ``G Ω``, or ``Gᵀ Q``, so no gradient is
    ever whole, at two passes over the batches for each iteration and two more.

    Args:
        loss: ``(model, batch) -> scalar``, the mean over the batch.
        model: what :func:`lrjax.adapt` is given.
        batches: microbatches, all of one weight; a list or anything that can be gone
            through again, with a rank.
        where: which matrices, as in :func:`lrjax.adapt`.
        axes: as in :func:`lrjax.adapt`.
        rank: the width of the factors; twice that of the adapters and some more is
            enough. No more than each matrix has.
        power_iters: subspace iterations; each makes small singular values matter less.
        key: for the sketch.

    Returns:
        ``{path: gradient}``, for ``lrjax.adapt(…, data=…)``.

    Raises:
        ValueError: if there are no batches, or they are an iterator and there is a rank;
            if there is a rank and no key.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> loss = lambda model, x: jnp.mean(jax.vmap(model)(x) ** 2)
        >>> batches = jax.random.normal(jax.random.key(1), (3, 5, 4))
        >>> grads = lrjax.adapters.gradient_statistics(loss, model, batches)
        >>> adapters = lrjax.adapt(
        ...     model, lrjax.LoRA(1, init="lora_ga"), data=grads, key=jax.random.key(2))
        >>> thin = lrjax.adapters.gradient_statistics(
        ...     loss, model, batches, rank=3, key=jax.random.key(3))
        >>> bool(lrjax.norm(thin["layers.2"]) <= jnp.linalg.norm(grads["layers.2"]) * 1.001)
        True

    Reference:
        S. Wang, L. Yu, J. Li, "LoRA-GA: low-rank adaptation with gradient approximation"
        (2024), arXiv:2407.05000, for gradients as starts; N. Halko, P.-G. Martinsson,
        J. A. Tropp, "Finding structure with randomness: probabilistic algorithms for
        constructing approximate matrix decompositions" (2011), arXiv:0909.4061, for the
        factors.
    """
    check_key("gradient_statistics", key)
    if rank is None:
        copies = adapt(model, _Whole(), where=where, axes=axes, key=jr.key(0))
        gradient = _mean_gradient(loss, model, copies, batches)
        return map_adapters(lambda _, copy: copy.matrix, gradient).layers
    if key is None:
        raise ValueError("gradient_statistics with a rank draws a sketch: pass key=.")
    check_repeatable("gradient_statistics", batches)
    sides = adapt(model, _Sketch(rank), where=where, axes=axes, key=key)
    for _ in range(power_iters + 1):
        images = _mean_gradient(loss, model, sides, batches)
        sides = map_adapters(_onto_left, sides, images)
        images = _mean_gradient(loss, model, sides, batches)
        beside = lambda _, side, image: LowRank(side.pair.left, image.pair.right)
        factors: Any = map_adapters(beside, sides, images).layers
        sides = map_adapters(_onto_right, sides, images)
    return factors


class _Whole(AdapterKind):
    """A float32 copy of the matrix: what its gradient is taken with respect to."""

    def init(self, site, *, key, pool=None, data=None):
        """The copy."""
        return FullCopy(site.read(), None)


class _Sketch(AdapterKind):
    """Random directions of the inputs: the gradient of the left factor is ``G Ω``."""

    rank: int = eqx.field(static=True)

    def init(self, site, *, key, pool=None, data=None):
        """A zero factor beside the directions."""
        (m, n), dtype = site.shape, working_dtype(site.dtype)
        width = min(self.rank, m, n)
        pair = LowRank(jnp.zeros((m, width), dtype), jr.normal(key, (n, width), dtype))
        return Factors(pair, None, jnp.ones((), dtype), None, "left")


def _onto_left(path: str, side: Factors, image: Factors) -> Factors:
    """From ``G Ω`` to its basis Q: the gradient of the right factor is ``Gᵀ Q``."""
    del path
    basis = orthonormalize(image.pair.left)
    pair = LowRank(basis, jnp.zeros_like(side.pair.right))
    return dataclasses.replace(side, pair=pair, train="right")


def _onto_right(path: str, side: Factors, image: Factors) -> Factors:
    """From ``Gᵀ Q`` to its basis, as directions of the inputs."""
    del path
    basis = orthonormalize(image.pair.right)
    pair = LowRank(jnp.zeros_like(side.pair.left), basis)
    return dataclasses.replace(side, pair=pair, train="left")


def _mean_gradient(
    loss: Callable, model: PyTree, adapters: Adapters, batches: Iterable[Any]
) -> Adapters:
    of = lambda batch: _gradient(loss, model, adapters, batch)
    total, count = summed("gradient_statistics", of, batches)
    return jax.tree.map(lambda x: x / count, total)


@eqx.filter_jit
def _gradient(loss: Callable, model: PyTree, adapters: Adapters, batch: Any) -> Adapters:
    params, frozen = partition(adapters)
    of = lambda params: loss(bind(model, eqx.combine(params, frozen)), batch)
    return jax.grad(of)(params)
