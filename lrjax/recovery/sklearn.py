"""The fits as scikit-learn estimators, for pipelines, searches and tables.

They need scikit-learn, ``pip install 'lrjax[sklearn]'``, and are imported by their module:
``from lrjax.recovery.sklearn import RobustPCA, MatrixCompletion``.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _extras
from ..linalg import outer
from ._inputs import matrix_entries
from ._variance import centered
from .completion import CompletionFit, fit_completion
from .separation import RobustPCAFit, fit_robust_pca


_extras.load("sklearn", "sklearn", "lrjax.recovery.sklearn")

from sklearn.base import (  # noqa: E402 - after the sentence that names the extra
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    OneToOneFeatureMixin,
    TransformerMixin,
)
from sklearn.utils.validation import check_is_fitted, validate_data  # noqa: E402


ROUNDING = 20.0  # values below ROUNDING · tol of the largest are what tol leaves of zero
WIDEST = 40  # what the separation looks for by itself
BLOCK = 128  # rows that are regressed at once: one program, whatever their number
FLOATS = (np.float64, np.float32)

_robust_pca = jax.jit(fit_robust_pca, static_argnames=("rank", "max_steps"))
_completion = jax.jit(
    fit_completion, static_argnames=("shape", "rank", "units", "robust", "max_steps")
)


class _Base(TransformerMixin, BaseEstimator):
    """What both share: NaN is missing, and float types are kept."""

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = [np.dtype(t).name for t in FLOATS]
        return tags

    def _validated(self, X: Any, *, reset: bool) -> np.ndarray:
        checked: Any = validate_data(
            self,
            X,
            reset=reset,
            dtype=FLOATS,
            ensure_all_finite="allow-nan",
            ensure_min_samples=2 if reset else 1,
        )
        return checked


class RobustPCA(ClassNamePrefixFeaturesOutMixin, _Base):
    """Principal components of a table in which some entries are grossly wrong or missing.

    :func:`lrjax.fit_robust_pca` takes the table apart, ``X ≈ L + S``. The components are
    those of L, whose rows are centered: mean and components are what PCA would find if
    the gross errors and the gaps were not there. New rows are regressed on L's row space
    in the l1 norm, so errors and gaps in them do no harm either.

    Args:
        n_components: at most as many components; by default as many as the data have.
        nuclear_weight: as in :func:`lrjax.fit_robust_pca`; ``None`` for its default.
        tol: relative residual at which the separation stops.
        max_iter: at most as many iterations.

    Attributes:
        components_: ``(n_components_, n_features)``, orthonormal rows.
        mean_: ``(n_features,)``, the mean of the rows of L.
        singular_values_: ``(n_components_,)``, those of the centered L.
        explained_variance_: their squares over the number of rows less one.
        explained_variance_ratio_: their shares of the variance of the table without its
            gross errors, ``fit_.explained_variance_ratio``.
        n_components_: how many there are.
        n_iter_: iterations made.
        fit_: the :class:`lrjax.recovery.RobustPCAFit`; its ``sparse`` are the errors.

    Raises:
        ValueError: for tables that are no matrix of numbers, or ``n_components`` out of
            range.
        ImportError: where the module is imported without scikit-learn.

    Example:
        >>> import numpy as np
        >>> from lrjax.recovery.sklearn import RobustPCA
        >>> t = np.arange(60.0)
        >>> X = np.outer(np.sin(t), np.arange(1.0, 31.0)) + 2
        >>> dirty = X.copy()
        >>> dirty[3, 5], dirty[10, 2], dirty[20, 0] = 1e3, np.nan, -50.0
        >>> pca = RobustPCA().fit(dirty)
        >>> pca.n_components_
        1
        >>> clean = pca.inverse_transform(pca.transform(dirty))
        >>> bool(abs(clean - X).max() < 1e-2)
        True

    Reference:
        See :func:`lrjax.fit_robust_pca`.
    """

    def __init__(self, n_components=None, *, nuclear_weight=None, tol=1e-6, max_iter=100):
        self.n_components = n_components
        self.nuclear_weight = nuclear_weight
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: Any, y: Any = None) -> "RobustPCA":
        """Find mean and components.

        Args:
            X: ``(n_samples, n_features)``; NaN is missing.
            y: not used.
        """
        X = self._validated(X, reset=True)
        most = min(X.shape)
        self._check_components(most)
        # All directions that there are, of which the first ones stay: what a narrower fit
        # could not hold would count as gross errors. The mean takes one of them.
        wanted = self.n_components or 0
        width = min(wanted + 1, most) if wanted >= WIDEST else None
        options = (
            {} if self.nuclear_weight is None else {"nuclear_weight": self.nuclear_weight}
        )
        fit = _robust_pca(X, rank=width, tol=self.tol, max_steps=self.max_iter, **options)
        mean, values, components = map(np.asarray, _centered(fit.low_rank))
        rank = np.sum(values > ROUNDING * self.tol * values[0])
        count = max(1, int(min(rank, self.n_components or most)))
        variances = (values.astype(X.dtype) ** 2) / (len(X) - 1)
        self.fit_ = fit
        self.n_iter_ = max(1, int(fit.steps))
        self.n_components_ = count
        self.mean_ = mean.astype(X.dtype)
        self.components_ = components.T[:count].astype(X.dtype)
        self.singular_values_ = values[:count].astype(X.dtype)
        self.explained_variance_ = variances[:count]
        ratio = np.asarray(fit.explained_variance_ratio)
        self.explained_variance_ratio_ = ratio[:count].astype(X.dtype)
        return self

    def transform(self, X: Any) -> np.ndarray:
        """The coordinates of rows, ``(n_samples, n_components_)``, robustly."""
        check_is_fitted(self)
        X = self._validated(X, reset=False)
        clean = _by_blocks(functools.partial(_clean_rows, self.fit_), X)
        return ((clean - self.mean_) @ self.components_.T).astype(X.dtype)

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Clean rows out of coordinates, ``(n_samples, n_features)``."""
        check_is_fitted(self)
        return np.asarray(X) @ self.components_ + self.mean_

    @property
    def _n_features_out(self) -> int:
        return self.components_.shape[0]

    def _check_components(self, most: int) -> None:
        count = self.n_components
        if count is None:
            return
        whole = isinstance(count, int | np.integer) and not isinstance(count, bool)
        if not whole or not 1 <= count <= most:
            raise ValueError(
                f"RobustPCA: n_components must be None or an integer between 1 and "
                f"min(n_samples, n_features) = {most}, got {count!r}."
            )


class MatrixCompletion(OneToOneFeatureMixin, _Base):
    """An imputer: the gaps of a table filled in by a low-rank matrix with known noise.

    :func:`lrjax.fit_completion` finds rank, noise and ridges, and the effects of rows and
    columns. A new row is regressed on the columns' factor with the noise and the prior
    that were learned: one without any entry becomes the mean row. Observed entries stay
    as they are.

    Args:
        n_components: the largest rank, by default 40 or the shorter side.
        units: ``"columns"`` where each column has a unit of its own, ``"shared"`` where
            all have the same, such as ratings, pixels or channels of one instrument.
            There the noise is the same in all columns, which ``"columns"`` cannot know.
        robust: whether to reckon with gross errors among the entries.
        keep_empty_features: keep columns without entries, as zeros; by default they are
            left out, as in the other imputers.
        tol: stop when an iteration moves the matrix by less than this share of its norm.
        max_iter: at most as many iterations.

    Attributes:
        fit_: the :class:`lrjax.recovery.CompletionFit` of the table less ``center_``.
        center_: of the columns that have entries, or of all.
        rank_: the number of directions that the data support.
        noise_: the standard deviation of the noise of each column.
        n_iter_: iterations made.

    Raises:
        ValueError: for tables that are no matrix of numbers.
        ImportError: where the module is imported without scikit-learn.

    Example:
        >>> import numpy as np
        >>> from lrjax.recovery.sklearn import MatrixCompletion
        >>> X = np.outer(np.arange(1.0, 21.0), [1.0, -2.0, 5.0, 3.0]) + 100
        >>> table = X.copy()
        >>> table[3, 1] = table[7, 0] = table[12, 3] = np.nan
        >>> filled = MatrixCompletion().fit_transform(table)
        >>> bool(abs(filled - X).max() < 0.1 * X.std())
        True

    Reference:
        See :func:`lrjax.fit_completion`.
    """

    def __init__(
        self,
        n_components=None,
        *,
        units="columns",
        robust=False,
        keep_empty_features=False,
        tol=1e-5,
        max_iter=100,
    ):
        self.n_components = n_components
        self.units = units
        self.robust = robust
        self.keep_empty_features = keep_empty_features
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: Any, y: Any = None) -> "MatrixCompletion":
        """Learn what columns have to do with each other.

        Args:
            X: ``(n_samples, n_features)``; NaN is missing.
            y: not used.
        """
        X = self._validated(X, reset=True)
        self._seen = ~np.all(np.isnan(X), axis=0)
        if not self._seen.any():
            raise ValueError(
                "MatrixCompletion needs at least one observed entry, got none."
            )
        known = X[:, self._seen]
        self.center_ = _center(known, self.units, self.robust)
        rows, cols, values, shape = matrix_entries(known - self.center_)
        rank = self.n_components and min(self.n_components, *shape)
        self.fit_ = _completion(
            *_padded(rows, cols, values),
            shape=shape,
            rank=rank,
            units=self.units,
            robust=self.robust,
            tol=self.tol,
            max_steps=self.max_iter,
        )
        self.rank_ = int(self.fit_.rank)
        self.noise_ = np.broadcast_to(np.asarray(self.fit_.noise, X.dtype), shape[1:])
        self.n_iter_ = max(1, int(self.fit_.steps))
        return self

    def transform(self, X: Any) -> np.ndarray:
        """The table with its gaps filled in."""
        check_is_fitted(self)
        X = self._validated(X, reset=False)
        known = X[:, self._seen]
        rest = known - self.center_
        filled = _by_blocks(functools.partial(_completed_rows, self.fit_), rest)
        filled = (filled + self.center_).astype(X.dtype)
        whole = np.where(np.isnan(known), filled, known)
        if not self.keep_empty_features:
            return whole
        out = np.zeros(X.shape, X.dtype)
        out[:, self._seen] = whole
        return out

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """The names of the columns that are left."""
        check_is_fitted(self)
        names: Any = super().get_feature_names_out(input_features)
        return names if self.keep_empty_features else names[self._seen]


_centered = jax.jit(centered)


def _clean_rows(fit: RobustPCAFit, rows: jax.Array) -> jax.Array:
    # Each for itself: no row stops or scales the regression of another.
    left = jax.vmap(lambda row: fit.transform(row[None, :])[0])(rows)
    return outer(left, fit.low_rank.right)


def _completed_rows(fit: CompletionFit, rows: jax.Array) -> jax.Array:
    left = fit.transform(*matrix_entries(rows)[:3], len(rows))
    return outer(left, fit.low_rank.right)


def _by_blocks(function: Callable, X: np.ndarray) -> np.ndarray:
    """A function of rows, by blocks of one size: one program for any number of rows."""
    out = []
    for start in range(0, len(X), BLOCK):
        rows = X[start : start + BLOCK]
        block = np.full((BLOCK, X.shape[1]), np.nan, X.dtype)
        block[: len(rows)] = rows
        out.append(np.asarray(_call(function.func, function.args[0], block))[: len(rows)])
    return np.concatenate(out)


@functools.partial(jax.jit, static_argnums=0)
def _call(function: Callable, fit: Any, rows: jax.Array) -> jax.Array:
    return function(fit, rows)


def _center(known: np.ndarray, units: str, robust: bool) -> np.ndarray:
    """About the middle, in the precision of the table: what is fitted keeps its digits."""
    middle = np.nanmedian if robust else np.nanmean
    return middle(known, axis=0 if units == "columns" else None)


def _padded(rows: jax.Array, cols: jax.Array, values: jax.Array) -> tuple[Any, ...]:
    """Entries filled up with missing ones to a power of two: fewer programs."""
    more = (1 << (len(values) - 1).bit_length()) - len(values)
    return (
        jnp.pad(rows, (0, more)),
        jnp.pad(cols, (0, more)),
        jnp.pad(values, (0, more), constant_values=jnp.nan),
    )
