"""How many samples are in the wrong cluster, whatever the clusters are called."""

import numpy as np
from jaxtyping import ArrayLike, Int
from scipy.optimize import linear_sum_assignment


def clustering_error(labels: Int[ArrayLike, " n"], truth: Int[ArrayLike, " m"]) -> float:
    """The share of samples in the wrong cluster, under the best naming of the clusters.

    ``1 − max_π Σ_k #{i: labels_i = k, truth_i = π(k)} / n`` over one-to-one maps π, found
    by the Hungarian algorithm. Clusters beyond the number of true ones are wrong.

    Args:
        labels: ``(n,)`` integers, those that were found.
        truth: ``(n,)`` integers.

    Returns:
        A number from 0 to 1. Computed by NumPy, not under ``jit``.

    Raises:
        ValueError: for labels of other lengths, or none.

    Example:
        >>> import lrjax, numpy as np
        >>> found, truth = np.array([1, 1, 0, 0, 0]), np.array([0, 0, 0, 1, 1])
        >>> round(lrjax.clustering.clustering_error(found, truth), 2)
        0.2
    """
    found, truth = np.asarray(labels), np.asarray(truth)
    if found.shape != truth.shape or found.ndim != 1 or not len(found):
        raise ValueError(
            f"clustering_error needs two lists of labels of one length, got shapes "
            f"{found.shape} and {truth.shape}."
        )
    rows = np.unique(found, return_inverse=True)[1]
    columns = np.unique(truth, return_inverse=True)[1]
    counts = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(counts, (rows, columns), 1)
    best = counts[linear_sum_assignment(-counts)].sum()
    return float(1 - best / len(found))
