"""Pictures of fits: where the rank ends, and what is off beside what was found."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from .. import _extras
from ..lowrank import LowRank


SAMPLE = 20_000  # entries that stand for all
BINS = 40
DECADES = 6  # below the largest entry: what is smaller is drawn at the edge


def sampled_entries(x: LowRank) -> Array:
    """Entries at random places, the same in every call."""
    rng = np.random.default_rng(0)
    rows, cols = (jnp.asarray(rng.integers(size, size=SAMPLE)) for size in x.shape)
    return jnp.sum(x.left[rows] * x.right[cols], axis=1)


def norm_of_noise(deviation: ArrayLike, shape: tuple[int, ...]) -> Array:
    """About the largest singular value of independent entries."""
    m, n = shape
    return jnp.asarray(deviation) * (m**0.5 + n**0.5)


def refuse_batch(fit: Any) -> None:
    """Refuse what ``vmap`` returns."""
    if fit.steps.ndim:
        raise ValueError(
            f"plot draws one fit, got a batch {fit.steps.shape} of them. Choose one, "
            "as in jax.tree.map(lambda x: x[0], fits)."
        )


def plot_fit(
    fit: Any,
    spectra: Mapping[str, tuple[Array, Any]],
    entries: Array,
    errors: Array | None,
    levels: Mapping[str, Any],
    noise: Any = 0.0,
) -> Any:
    """Draw singular values with the rank, and the sizes of entries beside their errors.

    Args:
        fit: says whether it has converged and can be trusted.
        spectra: by name singular values, falling, and how many of them count.
        entries: of the low-rank part, some or all.
        errors: the gross errors among all entries, zero where there is none.
        levels: sizes to be marked by name; those that are zero or infinite are not.
        noise: the singular value that noise alone would have, marked likewise.

    Returns:
        The matplotlib figure, with two axes.
    """
    figure = _extras.load("matplotlib.pyplot", "plot", "A plot").figure(
        figsize=(9, 3.6), layout="constrained"
    )
    scree, sizes = figure.subplots(1, 2)
    _draw_spectra(scree, spectra)
    if 0 < float(noise) < np.inf:
        scree.axhline(float(noise), color="tab:green", linestyle="--", label="noise alone")
    scree.legend(fontsize="small")
    _draw_sizes(sizes, np.abs(np.asarray(entries)).ravel(), errors)
    for (name, level), color in zip(levels.items(), ("black", "tab:green"), strict=False):
        if 0 < float(level) < np.inf:
            sizes.axvline(float(level), color=color, linestyle="--", label=name)
    sizes.legend(fontsize="small")
    verdict = "trusted" if fit.trusted else "not to be trusted"
    state = "converged" if fit.converged else "not converged"
    figure.suptitle(f"{state} after {int(fit.steps)} steps, {verdict}")
    return figure


def _draw_spectra(axes: Any, spectra: Mapping[str, tuple[Array, Any]]) -> None:
    for name, (values, rank) in spectra.items():
        rank = int(rank)
        values = np.asarray(values)[:rank]
        label = f"{name}: rank {rank}" if name else f"rank {rank}"
        (line,) = axes.semilogy(np.arange(1, rank + 1), values, "o-", label=label)
        axes.axvline(rank + 0.5, color=line.get_color(), linestyle=":")
    axes.set(xlabel="direction", ylabel="singular value")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_sizes(axes: Any, entries: np.ndarray, errors: Array | None) -> None:
    groups = {"low-rank part": (entries, len(entries))}
    if errors is not None:
        gross = np.abs(np.asarray(errors)).ravel()
        wrong = gross[gross > 0]
        share = len(wrong) / len(gross)
        groups[f"gross errors, {share:.2g} of the entries"] = wrong, len(gross)
    most = max([x.max(initial=0) for x, _ in groups.values()]) or 1.0
    bins = np.geomspace(most * 10.0**-DECADES, most, BINS + 1)
    for name, (x, count) in groups.items():
        weights = np.full(len(x), 1 / count)
        axes.hist(np.clip(x, bins[0], most), bins, weights=weights, alpha=0.6, label=name)
    axes.set(xscale="log", xlabel="absolute value", ylabel="share of the entries")
