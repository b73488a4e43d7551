"""What to look at in every step: ready functions for ``solve(..., observe=…)``."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
from jaxtyping import Array, Float

from ...linalg import cross, gram, nonzero
from ...lowrank import LowRank, truncate
from ...metrics import imbalance, singular_values
from .solve import pyplot


class Spectrum(NamedTuple):
    """The shape of a matrix in factors.

    Attributes:
        singular_values: ``(k,)``, descending.
        imbalance: ``‖leftᵀleft − rightᵀright‖_F`` over ``‖left‖² + ‖right‖²``.
    """

    singular_values: Float[Array, "... k"]
    imbalance: Float[Array, "..."]


def spectrum(state: Any) -> Spectrum:
    """The singular values and the relative imbalance: ``solve(..., observe=spectrum)``.

    Args:
        state: a :class:`SolveState`, or the :class:`lrjax.flows.FlowState` of a flow whose
            parameters are one pair of factors.

    Returns:
        A :class:`Spectrum`; :meth:`Solution.plot` draws it.

    Example:
        >>> import jax, lrjax
        >>> key, seen = jax.random.key(0), lrjax.recovery.spectrum
        >>> problem = lrjax.matrix_sensing(key, (9, 7), 1, 200)
        >>> start = lrjax.spectral_init(problem, 2, key=key)
        >>> solution = lrjax.solve(problem, lrjax.opsa(), start, steps=50, observe=seen)
        >>> print(solution.history.observed.singular_values[-1].round(2))
        [1. 0.]
    """
    x = state.params
    size = jnp.sum(x.left**2, axis=(-2, -1)) + jnp.sum(x.right**2, axis=(-2, -1))
    uneven = jnp.linalg.norm(imbalance(x), axis=(-2, -1))
    return Spectrum(singular_values(x), uneven / nonzero(size))


class Staircase(NamedTuple):
    """How far a matrix is from the best approximations of the truth.

    Attributes:
        distances: ``(k,)``, ``‖X − truth_s‖_F/‖truth_s‖_F`` for the ranks s = 1, …, k.
    """

    distances: Float[Array, "... k"]


def staircase(truth: LowRank) -> Callable[[Any], Staircase]:
    """The distances to the best approximations of a known truth, of every rank.

    From a small start gradient descent learns one singular direction after the other:
    the distance to the best approximation of rank s has a deep minimum while the first s
    have been learned and the next has not. The minima are the deeper the smaller the
    start. In float32 no distance below about 3e-4 is resolved. Use it as
    ``solve(problem, tx, start, observe=staircase(problem.truth))``.

    Args:
        truth: what is being recovered; its width is the number of stairs.

    Returns:
        A function for ``observe``; :meth:`Solution.plot` draws what it returns.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> truth = lrjax.LowRank(jnp.diag(jnp.array([2.0, 1.0])), jnp.eye(2))
        >>> state = lrjax.recovery.SolveState(0, lrjax.truncate(truth, 1), 0.0)
        >>> print(lrjax.recovery.staircase(truth)(state).distances.round(3))
        [0.    0.447]

    Reference:
        J. Jin, Z. Li, K. Lyu, S. Du, J. Lee, "Understanding incremental learning of
        gradient descent: a fine-grained analysis of matrix sensing" (2023), arXiv
        2301.11500.
    """
    steps = truncate(truth, truth.rank)
    values = jnp.diagonal(gram(steps.left), axis1=-2, axis2=-1)
    partial = jnp.sqrt(jnp.cumsum(values**2, axis=-1))

    def observe(state: Any) -> Staircase:
        x = state.params
        # ‖X − M_s‖² = ‖X‖² − 2⟨X, M_s⟩ + ‖M_s‖², one column of the truth a time.
        products = cross(x.left, steps.left) * cross(x.right, steps.right)
        shared = jnp.cumsum(jnp.sum(products, axis=0))
        own = jnp.sum(gram(x.left) * gram(x.right))
        square = own - 2 * shared + partial**2
        return Staircase(jnp.sqrt(jnp.maximum(square, 0)) / partial)

    return observe


def success_rate(errors: Any, level: float = 1e-4, axis: int | str | None = 0) -> Any:
    """The share of runs that recovered: relative errors at most ``level``.

    Args:
        errors: relative errors, an array or one of xarray, such as ``runs["error"]`` of a
            sweep; what is not finite counts as a failure.
        level: what counts as recovered.
        axis: the axis of the repetitions, or its name where there are names; ``None`` for
            all.

    Returns:
        The shares, with that axis gone and the labels of others kept.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> errors = jnp.array([[1e-6, 1.0], [1e-5, 1e-6]])
        >>> lrjax.recovery.success_rate(errors).tolist()
        [1.0, 0.5]
    """
    if _is_labelled(errors):
        dims = tuple(errors.dims)
        return (errors <= level).mean(dims[axis] if isinstance(axis, int) else axis)
    return jnp.mean(jnp.asarray(errors) <= level, axis=cast(int | None, axis))


def _is_labelled(x: Any) -> bool:
    """Whether it is of xarray, which is not imported for it."""
    return hasattr(x, "dims") and hasattr(x, "coords")


def plot_success(rates: Any, x: Any = None, y: Any = None, ax: Any = None) -> Any:
    """Draw a heat-map of success rates, with the line where half of the runs succeed.

    Args:
        rates: ``(len(y), len(x))`` shares between 0 and 1; or an xarray of two dimensions,
            such as ``success_rate(runs["error"], axis="key")`` of a sweep.
        x: values on the horizontal axis; of an xarray the name of a dimension, by default
            the last one.
        y: values on the vertical axis, as ``x``.
        ax: matplotlib axes; by default those of a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the shapes do not fit, or an xarray has other than two dimensions.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> rates = jnp.array([[1.0, 0.7], [0.6, 0.0]])
        >>> axes = lrjax.recovery.plot_success(rates, [0.1, 0.2], [1, 2])
        >>> print(*axes.get_ylim())
        0.5 2.5
    """
    plt = pyplot()
    names = None
    if _is_labelled(rates):
        rates, x, y, names = _unlabelled(rates, x, y)
    if x is None or y is None:
        raise ValueError(
            "plot_success needs the values on both axes, plot_success(rates, x, y), unless "
            "rates are an xarray, which knows them."
        )
    rates = jnp.asarray(rates)
    if rates.shape != (len(y), len(x)):
        raise ValueError(
            f"plot_success needs rates of shape (len(y), len(x)) = {(len(y), len(x))}, "
            f"got {rates.shape}."
        )
    if ax is None:
        ax = plt.figure(layout="constrained").add_subplot()
    mesh = ax.pcolormesh(x, y, rates, vmin=0, vmax=1, cmap="magma", shading="nearest")
    if min(rates.shape) > 1 and float(rates.min()) < 0.5 < float(rates.max()):
        ax.contour(x, y, rates, levels=[0.5], colors="white", linewidths=1.5)
    ax.figure.colorbar(mesh, ax=ax, label="success rate")
    if names is not None:
        ax.set(xlabel=names[0], ylabel=names[1])
    return ax


def _unlabelled(rates: Any, x: Any, y: Any) -> tuple[Any, Any, Any, tuple[str, str]]:
    """The numbers of an xarray, those on its axes, and the names of these."""
    if hasattr(rates, "data_vars"):
        if len(rates.data_vars) != 1:
            raise ValueError(
                f"plot_success draws one variable, got {list(rates.data_vars)}: choose, as "
                "in runs['error']."
            )
        (rates,) = rates.data_vars.values()
    others = [name for name in rates.dims if name not in (x, y)]
    x = others.pop() if x is None and others else x
    y = others.pop() if y is None and others else y
    if others or {x, y} != set(rates.dims):
        raise ValueError(
            f"plot_success draws two dimensions, got {rates.dims} for x={x!r} and y={y!r}: "
            "average over the others, success_rate(errors, axis='key')."
        )
    rates = rates.transpose(y, x)
    return rates.values, rates[x].values, rates[y].values, (x, y)
