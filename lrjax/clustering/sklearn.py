"""Subspace clustering as a scikit-learn estimator, for pipelines, searches and tables.

It needs scikit-learn, ``pip install 'lrjax[sklearn]'``, and is imported by its module:
``from lrjax.clustering.sklearn import SubspaceClustering``.
"""

from typing import Any

import jax
import numpy as np

from .. import _extras
from .self_expression import (
    affinity,
    low_rank_self_expression,
    ridge_self_expression,
    sparse_self_expression,
)


_extras.load("sklearn", "sklearn", "lrjax.clustering.sklearn")

from sklearn.base import BaseEstimator, ClusterMixin  # noqa: E402 - after that sentence
from sklearn.cluster import SpectralClustering  # noqa: E402
from sklearn.utils.validation import validate_data  # noqa: E402


METHODS = ("sparse", "low_rank", "ridge")
FLOATS = (np.float64, np.float32)

_sparse = jax.jit(
    sparse_self_expression, static_argnames=("affine", "max_support", "max_steps")
)
_closed = {
    "low_rank": jax.jit(low_rank_self_expression),
    "ridge": jax.jit(ridge_self_expression),
}
_affinity = jax.jit(affinity, static_argnames="keep")


class SubspaceClustering(ClusterMixin, BaseEstimator):
    """Clusters of samples, each near a subspace of its own, of unknown dimension.

    Each sample is expressed by the others, :func:`lrjax.clustering.affinity` makes a
    graph of that, and scikit-learn's ``SpectralClustering`` cuts it.

    Args:
        n_clusters: how many there are.
        method: ``"sparse"``, SSC or with ``l1_ratio`` the elastic net; ``"low_rank"``,
            LRSC; ``"ridge"``, LSR.
        affine: whether subspaces may miss the origin; of ``"sparse"`` coefficients then
            add up to one, for the others the mean is subtracted.
        fit_weight: how closely samples are fitted, as in
            :func:`lrjax.clustering.sparse_self_expression`.
        l1_ratio: of ``"sparse"``; below one it is the elastic net.
        keep: how many coefficients of a sample make edges; by default all.
        max_support: of ``"sparse"``.
        max_iter: of ``"sparse"``.
        random_state: of the spectral clustering.

    Attributes:
        labels_: ``(n_samples,)``.
        coefficients_: ``(n_samples, n_samples)``, a row for each sample.
        affinity_matrix_: ``(n_samples, n_samples)``.
        converged_: whether the self-expression is a minimum to its tolerance.
        n_iter_: its steps; one for a closed form.

    Raises:
        ValueError: for an unknown method.
        ImportError: where the module is imported without scikit-learn.

    Example:
        >>> import numpy as np
        >>> from lrjax.clustering.sklearn import SubspaceClustering
        >>> rng = np.random.default_rng(0)
        >>> plane = lambda: rng.standard_normal((20, 2)) @ rng.standard_normal((2, 6))
        >>> planes = [plane(), plane()]
        >>> labels = SubspaceClustering(2, random_state=0).fit_predict(np.vstack(planes))
        >>> bool((labels[:20] == labels[0]).all() and (labels[20:] != labels[0]).all())
        True

    Reference:
        See :func:`lrjax.clustering.sparse_self_expression`.
    """

    def __init__(
        self,
        n_clusters=8,
        *,
        method="sparse",
        affine=False,
        fit_weight=50.0,
        l1_ratio=1.0,
        keep=None,
        max_support=None,
        max_iter=1000,
        random_state=None,
    ):
        self.n_clusters = n_clusters
        self.method = method
        self.affine = affine
        self.fit_weight = fit_weight
        self.l1_ratio = l1_ratio
        self.keep = keep
        self.max_support = max_support
        self.max_iter = max_iter
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> "SubspaceClustering":
        """Find the clusters.

        Args:
            X: ``(n_samples, n_features)``.
            y: not used.
        """
        if self.method not in METHODS:
            raise ValueError(
                f"SubspaceClustering: method must be one of {METHODS}, got {self.method!r}."
            )
        x: Any = validate_data(self, X, dtype=FLOATS, ensure_min_samples=2)
        if self.method == "sparse":
            most = self.max_support and min(self.max_support, len(x) - 1)
            found = _sparse(
                x,
                fit_weight=self.fit_weight,
                l1_ratio=self.l1_ratio,
                affine=self.affine,
                max_support=most,
                max_steps=self.max_iter,
            )
            coefficients = found.coefficients
            self.converged_ = bool(found.converged)
            self.n_iter_ = max(1, int(found.steps))
        else:
            centered = x - x.mean(axis=0) if self.affine else x
            coefficients = _closed[self.method](centered, fit_weight=self.fit_weight)
            self.converged_, self.n_iter_ = True, 1
        keep = self.keep and min(self.keep, len(x))
        self.coefficients_ = np.asarray(coefficients)
        self.affinity_matrix_ = np.asarray(_affinity(coefficients, keep=keep))
        # The graph of clean samples has as many parts as there are subspaces: each is
        # tied to the others by next to nothing, which scikit-learn takes for one graph.
        tied = self.affinity_matrix_.astype(np.float64) + 1e-9
        np.fill_diagonal(tied, 0)
        self.labels_ = SpectralClustering(
            self.n_clusters,
            affinity="precomputed",
            assign_labels="kmeans",
            n_init=20,
            random_state=self.random_state,
        ).fit_predict(tied)
        return self
