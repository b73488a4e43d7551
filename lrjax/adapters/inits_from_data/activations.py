from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, PRNGKeyArray, PyTree

from ..._arguments import check_key
from ...linalg import orthonormalize, working_dtype
from .._where import Where
from ..adapt import adapt
from ..bind import bind
from ..kinds.statistic import InputStatistic
from ..protocol import Adapter, AdapterKind, Ready, trained
from ..tree import Adapters, map_adapters, partition
from ._stream import summed


def activation_statistics(
    call: Callable[[PyTree, Any], PyTree],
    model: PyTree,
    batches: Iterable[Any],
    *,
    where: Where = None,
    rank: int | None = None,
    key: PRNGKeyArray | None = None,
) -> dict[str, InputStatistic]:
    """First and second moments of the inputs of layers, over a stream of batches.

    The input of a layer is the x in ``W x``: of a convolution each of its patches. Without
    a rank, ``Σ x xᵀ (in, in)`` of each; with one, ``Σ x (xᵀ Ω)`` for random Ω of that
    width. Both are sums over all inputs: those of other batches are added with ``+``, in
    one pass over a stream of which nothing is kept. Of batches that a mesh shards they are
    global; where ``shard_map`` hands out parts, ``psum`` adds them up.

    The layers are found where they are called, in scans, under ``vmap`` and in attention:
    the sums are the gradient with respect to zeros beside the weights, whose cotangents
    are set to what has to be summed. So a layer must reach the output of ``call`` in a
    differentiable way.

    Args:
        call: ``(model, batch) -> outputs``, any tree with floating-point arrays.
        model: what :func:`lrjax.adapt` is given.
        batches: anything to go through once.
        where: which layers, as in :func:`lrjax.adapt`; arrays that are no layers have no
            inputs.
        rank: the width of Ω; a few times the rank that is asked for later.
        key: for Ω.

    Returns:
        ``{path: statistic}``, for ``lrjax.adapt(…, data=…)``.

    Raises:
        ValueError: if there are no batches, if a picked site is no layer that acts as a
            product or its output does not reach that of ``call``, if there is a rank
            and no key.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> call = lambda model, x: jax.vmap(model)(x)
        >>> batches = jax.random.normal(jax.random.key(1), (3, 5, 4))
        >>> statistics = lrjax.adapters.activation_statistics(call, model, batches)
        >>> statistics["layers.0"].count.item()
        15.0
        >>> kind = lrjax.LoRA(2, init="eva")
        >>> adapters = lrjax.adapt(model, kind, data=statistics, key=jax.random.key(2))

    Reference:
        F. Paischer et al., "One initialization to rule them all: fine-tuning via explained
        variance adaptation" (2024), arXiv:2410.07170, for what they are good for.
    """
    check_key("activation_statistics", key)
    if rank is not None and key is None:
        raise ValueError("activation_statistics with a rank draws a sketch: pass key=.")
    taps = adapt(model, _Tapping(rank), where=where, key=jr.key(0) if key is None else key)
    of = lambda batch: _sums(call, model, taps, batch)
    sums, _ = summed("activation_statistics", of, batches)
    whole = eqx.combine(sums, partition(taps)[1])
    found: Any = map_adapters(lambda _, tap: tap.sums, whole).layers
    _check_seen({path: statistic.count for path, statistic in found.items()})
    return found


@eqx.filter_jit
def _sums(call: Callable, model: PyTree, taps: Adapters, batch: Any) -> Adapters:
    params, frozen = partition(taps)

    def total(params: Adapters) -> Array:
        outputs = call(bind(model, eqx.combine(params, frozen)), batch)
        floating = filter(eqx.is_inexact_array, jax.tree.leaves(outputs))
        return sum((jnp.sum(x.real) for x in floating), jnp.zeros(()))

    return jax.grad(total)(params)


class _Tapping(AdapterKind):
    """Zeros beside a weight, in which the sums are collected."""

    rank: int | None = eqx.field(static=True)

    def init(self, site, *, key, pool=None, data=None):
        """The zeros, and the directions of a sketch."""
        if site.kind in ("array", "vector"):
            raise ValueError(
                f"{site.path or 'the root'} is an array that other code reads: what it is "
                "multiplied with is not seen. Leave it out with where=."
            )
        (m, n), dtype = site.shape, working_dtype(site.dtype)
        probe, width = None, n
        if self.rank is not None:
            width = min(self.rank, n)
            probe = orthonormalize(jr.normal(key, (n, width), dtype))
        zeros = lambda *shape: jnp.zeros(shape, dtype)
        sums = InputStatistic(zeros(n, width), zeros(n), zeros(), zeros(), probe)
        return Tap(sums, m)


class Tap(Adapter):
    """An adapter that changes nothing and whose gradient are sums over inputs."""

    sums: InputStatistic
    rows: int = eqx.field(static=True)

    @property
    def shape(self):
        """That of the weight."""
        *stack, n, _ = self.sums.image.shape
        return (*stack, self.rows, n)

    def trainable(self):
        """The sums."""
        spec = trained(self, lambda tap: tap.sums)
        if self.sums.probe is None:
            return spec
        return eqx.tree_at(lambda tap: tap.sums.probe, spec, False)

    def prepare(self, site, pool=None):
        """Nothing to prepare."""
        return Tapped(self.sums)


class Tapped(Ready):
    """``W' = W``, which notes its inputs."""

    sums: InputStatistic

    def weight(self, base):
        """The weight as it is."""
        return base

    def output(self, site, x):
        """That of the layer, tied to the sums."""
        n, _ = self.sums.image.shape
        probe = self.sums.probe
        probe = jnp.eye(n, dtype=self.sums.image.dtype) if probe is None else probe
        seen = lax.stop_gradient(site.down(probe, x))
        # Patches are copies of numbers of x: their squares are the patches of the squares.
        squares = x if site.kind == "lookup" else x**2
        lengths = site.down(jnp.ones_like(probe[:, :1]), squares)[..., 0]
        moments = jnp.concatenate([self.sums.image, self.sums.total[:, None]], axis=1)
        sums = site.down(moments, x)
        # Of all inputs, so that under vmap there is one for each.
        nothing = lax.stop_gradient(sums[..., 0])
        scalars = self.sums.energy + nothing, self.sums.count + nothing
        one = jnp.ones_like(lengths)
        values = jnp.concatenate([seen, one[..., None]], axis=-1)
        return _noted(site.base(x), (sums, *scalars), (values, lengths, one))


@jax.custom_vjp
def _noted(y: Array, sums: PyTree, values: PyTree) -> Array:
    """``y``, and in the backward pass ``values`` as the cotangents of ``sums``."""
    del sums, values
    return y


def _noted_forward(y, sums, values):
    return y, values


def _noted_backward(values, cotangent):
    return cotangent, values, jax.tree.map(jnp.zeros_like, values)


_noted.defvjp(_noted_forward, _noted_backward)


def _check_seen(counts: dict[str, Array]) -> None:
    known = {k: v for k, v in counts.items() if not isinstance(v, Tracer)}
    if unseen := [path for path, count in known.items() if not jnp.all(count > 0)]:
        raise ValueError(
            f"No inputs were seen at {unseen}: the layer is not called in call(model, "
            "batch), has a __call__ of its own, or its output does not reach that of call "
            "in a differentiable way. Leave it out with where=."
        )
