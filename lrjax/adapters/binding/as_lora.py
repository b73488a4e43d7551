from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from ..._sites import Site
from ...linalg import TruncatedSVD, nonzero, product_svd, truncated_svd
from ...lowrank import LowRank
from .._settings import checked_rank
from ..kinds import Factors
from ..protocol import Adapter, Adapters, Pool, Ready
from .bind import adapted_sites, dense_change


def as_lora(
    adapters: Adapters,
    model: PyTree,
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> Adapters:
    """The same change of every weight as a plain product of two factors, as of LoRA.

    ``W' = W + s · B A``. Without ``rank`` and ``energy`` it is exact, and asks for kinds
    whose change is a product (LoRA with any start, LoRA-XS, VeRA, …): their width stays.
    With one of them, ``B A`` is the truncated SVD of ``W' − W`` for every kind: of the
    given rank, or of the smallest that keeps a share ``energy`` of ``‖W' − W‖²_F``, the
    same for all matrices of a stack. An adapter that is narrower than ``rank`` already
    stays exact. What is lost: :func:`change_errors`.

    Args:
        adapters: of any kinds, from :func:`lrjax.adapt`.
        model: the model that they were made for.
        rank: the largest width.
        energy: in (0, 1]; decides a shape, so not under ``jit``.

    Returns:
        ``Adapters`` of :class:`lrjax.adapters.Factors`, in float32 or wider if a
        decomposition was needed, with the dropout that they had, and without pools.

    Raises:
        ValueError: for both ``rank`` and ``energy``, or values out of range; by path, for
            a change that is no product if neither is given, of a vector, or of a bias.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.LoRAXS(rank=2), key=jax.random.key(1))
        >>> lora = lrjax.adapters.as_lora(adapters, model)
        >>> lora["layers.0"].pair.shape, lora["layers.0"].pair.rank
        ((16, 4), 2)

    Reference:
        C. Eckart, G. Young, "The approximation of one matrix by another of lower rank"
        (1936), Psychometrika. The special case of exact factors is tested against
        ``merge``.
    """
    _check_asked(rank, energy)
    exact = rank is None and energy is None
    layers, refused = {}, []
    for path, (site, adapter, ready) in adapted_sites(model, adapters).items():
        found = stacked_factors(adapter, adapters.pools.get(adapter.pool_name() or ""))
        if found is None and exact:
            refused.append(f"{path} ({type(adapter).__name__})")
            continue
        mask = _mask_of(adapter)
        if found is None or not (exact or (rank and found[0].rank <= rank)):
            found, mask = _truncated(found, site, ready, rank, energy), None
        pair, scale = found
        # The scale of masked factors is that of the rank in use already.
        power = 1.0 if mask is None else 0.0
        rate = adapter.dropout_rate()
        layers[path] = Factors(pair, None, scale, rate, "both", mask=mask, power=power)
    if refused:
        raise ValueError(
            f"The change at {refused} is no product of two factors. Pass rank= or energy= "
            "for the nearest that is, from a truncated SVD of W' − W, or use lrjax.merge."
        )
    return Adapters(layers, {}, adapters.axes)


def change_errors(
    adapters: Adapters, other: Adapters, model: PyTree
) -> dict[str, Float[Array, "*b"]]:
    """How far two trees of adapters are apart, for instance after :func:`as_lora`.

    ``‖ΔW − ΔŴ‖_F / ‖ΔW‖_F`` with the changes ``ΔW = W' − W`` and ``ΔŴ`` that the two make
    of a weight, dense; without the divisor where ``ΔW`` is zero.

    Args:
        adapters: the first, which the errors are relative to.
        other: with adapters at the same paths.
        model: the model that both were made for.

    Returns:
        ``{path: (*b,)}``, one number for each matrix of a stack.

    Raises:
        ValueError: if the paths differ.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.DoRA(rank=2), key=jax.random.key(1))
        >>> lora = lrjax.adapters.as_lora(adapters, model, rank=2)
        >>> errors = lrjax.adapters.change_errors(adapters, lora, model)
        >>> {path: error.shape for path, error in errors.items()}
        {'layers.0': (), 'layers.1': (), 'layers.2': ()}
    """
    if adapters.layers.keys() != other.layers.keys():
        odd = sorted(adapters.layers.keys() ^ other.layers.keys())
        raise ValueError(f"Only one of the two trees has an adapter at {odd}.")
    second = adapted_sites(model, other)
    return {
        path: _relative(dense_change(site, ready()), dense_change(site, second[path][2]()))
        for path, (site, _, ready) in adapted_sites(model, adapters).items()
    }


def _check_asked(rank: Any, energy: Any) -> None:
    if rank is not None and energy is not None:
        raise ValueError("as_lora takes a rank or an energy, not both.")
    if rank is not None:
        checked_rank("as_lora", rank)
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"as_lora's energy must be in (0, 1], got {energy!r}.")


def beyond_factors(site: Site, ready: Ready) -> str | None:
    """What an adapter changes that no product of factors holds."""
    if site.kind == "vector":
        return "a vector"
    probe = None if site.bias is None else jnp.copy(site.bias)
    return None if ready.bias(probe) is probe else "a bias of its own"


def _check_is_matrix(site: Site, ready: Ready) -> None:
    """Refuse what a truncated SVD of the weight would drop without a word."""
    beyond = beyond_factors(site, ready)
    if beyond == "a vector":
        raise ValueError(
            f"{site.path} is a vector, whose change is no product of factors: leave it out "
            "of the adapters that as_lora is given."
        )
    if beyond is not None:
        raise ValueError(
            f"The adapter at {site.path!r} has {beyond}, which factors cannot "
            "hold: leave it out of the adapters that as_lora is given."
        )


def stacked_factors(adapter: Adapter, pool: Pool | None) -> tuple[LowRank, Array] | None:
    """The factors of one matrix, or of a stack, with one pool for all."""
    factors = lambda own: own.factors(pool)
    for _ in adapter.shape[:-2]:
        factors = eqx.filter_vmap(factors)
    return factors(adapter)


def _mask_of(adapter: Adapter) -> Array | None:
    """Which columns of the factors are there, ones and zeros."""
    if not isinstance(adapter, Factors) or adapter.mask is None or adapter.thinning:
        return None
    mask = (adapter.mask != 0).astype(adapter.scale.dtype)
    # The start, which is taken off, stands behind the factors.
    return mask if adapter.start is None else jnp.concatenate([mask, mask], axis=-1)


def _truncated(
    found: tuple[LowRank, Array] | None,
    site: Site,
    make: Callable[[], Ready],
    rank: int | None,
    energy: float | None,
) -> tuple[LowRank, Array]:
    """The leading part of a change, from its factors where it has some."""
    most = min(site.shape)
    if found is None:
        ready = make()
        _check_is_matrix(site, ready)
        triplets = truncated_svd(dense_change(site, ready), min(rank or most, most))
    else:
        pair, scale = found
        width = min(rank or pair.rank, pair.rank, most)
        triplets = product_svd(pair.left, None, pair.right, width)
        # A negative scale turns the left vectors.
        sign = jnp.where(scale < 0, -1, 1)[..., None, None]
        values = triplets.values * jnp.abs(scale)[..., None]
        triplets = TruncatedSVD(sign * triplets.left, values, triplets.right)
    values = triplets.values
    kept = values.shape[-1] if energy is None else _rank_of(values, energy)
    root = jnp.sqrt(values[..., None, :kept])
    pair = LowRank(triplets.left[..., :kept] * root, triplets.right[..., :kept] * root)
    return pair, jnp.ones(site.stack, pair.dtype)


def _rank_of(values: Float[Array, "*b k"], energy: float) -> int:
    """The fewest singular values with this share of the sum of squares, in every matrix."""
    if isinstance(values, Tracer):
        raise ValueError(
            "as_lora(energy=…) finds a rank, which is a shape: call it outside of jit and "
            "vmap, or give a rank."
        )
    squares = np.asarray(values, np.float64) ** 2
    sums = np.cumsum(squares, axis=-1)
    kept = sums >= energy * sums[..., -1:]
    return int(1 + np.max(np.argmax(kept, axis=-1)))


def _relative(want: Array, got: Array) -> Float[Array, "*b"]:
    norm = lambda x: jnp.sqrt(jnp.sum(x**2, axis=(-2, -1)))
    return norm(want - got) / nonzero(norm(want))
