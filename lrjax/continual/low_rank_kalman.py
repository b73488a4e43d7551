from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, PyTree

from .._sharding import einsum
from ..linalg import LowRankPlusDiagonal, eigh, tall_gram, tall_mix, tall_svd


class LowRankKalman(eqx.Module):
    """A model that learns from each sample once, by a Kalman filter of low rank (LoFi).

    What is known of the ``P`` parameters ``θ`` is a Gaussian with mean ``μ`` and the
    precision ``diag(Υ) + W Wᵀ``, with ``W (P, L)``. A batch is linearized at the mean, with
    the Jacobian ``J`` of the outputs and the covariance ``R = (F Fᵀ)⁻¹`` of their noise::

        W' = [W, JᵀF]        μ ← μ + (diag(Υ) + W'W'ᵀ)⁻¹ JᵀR⁻¹(y − f(μ))
        W ← the L leading left singular vectors of W', times their singular values

    and on a diagonal what is cut off adds its own to ``Υ``. Memory ``O(P L)``, time
    ``O(P (L + b)²)`` for b outputs. For a linear model it is recursive least squares
    as long as the rank of all samples is at most ``L``, and for ``L = P`` it is the Kalman
    filter.

    Attributes:
        mean: ``μ``, a tree of arrays.
        factor: ``W``, a tree like the mean with one more axis of length ``L``.
        diagonal: ``Υ``: a tree like the mean, or one number (a spherical filter).

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> x = jax.random.normal(jax.random.key(0), (40, 3))
        >>> y = x @ jnp.array([1.0, 2.0, 3.0])
        >>> model = lambda w, x: x @ w
        >>> start = lrjax.continual.LowRankKalman.start(jnp.zeros(3), 3, precision=1e-4)
        >>> step = lambda state, xy: (state.update(model, *xy, noise=0.1), None)
        >>> batches = x.reshape(10, 4, 3), y.reshape(10, 4)
        >>> state, _ = jax.lax.scan(step, start, batches)
        >>> print(state.mean.round(3))
        [1. 2. 3.]

    Reference:
        P. G. Chang, G. Durán-Martín, A. Shestopaloff, M. Jones, K. Murphy, "Low-rank
        extended Kalman filtering for online learning of neural networks from streaming
        data" (2023), arXiv 2305.19535. Special case:
        :class:`lrjax.continual.RecursiveLeastSquares`.
    """

    mean: PyTree[Float[Array, "..."]]
    factor: PyTree[Float[Array, "..."]]
    diagonal: PyTree[Float[Array, "..."]]

    @staticmethod
    def start(
        mean: PyTree[Float[Array, "..."]],
        rank: int,
        *,
        precision: ArrayLike = 1.0,
        form: str = "diagonal",
    ) -> "LowRankKalman":
        """Before the first sample.

        Args:
            mean: the parameters to begin with, a tree of float32 or float64.
            rank: ``L``.
            precision: of all parameters, the inverse of their prior variance.
            form: ``"diagonal"``: ``Υ`` has a number for each parameter; ``"spherical"``:
                one for all, which forgets more of what does not fit into the rank.

        Raises:
            ValueError: for a rank below one or above the number of parameters, or another
                form.
        """
        leaves = jax.tree.leaves(mean)
        size = sum(x.size for x in leaves)
        if not 1 <= rank <= size:
            raise ValueError(
                f"LowRankKalman needs a rank between 1 and the {size} parameters, got "
                f"{rank}."
            )
        if form not in ("diagonal", "spherical"):
            raise ValueError(f"form must be 'diagonal' or 'spherical', got {form!r}.")
        factor = jax.tree.map(lambda x: jnp.zeros((*x.shape, rank), x.dtype), mean)
        if form == "diagonal":
            diagonal = jax.tree.map(lambda x: jnp.full_like(x, precision), mean)
        else:
            diagonal = jnp.asarray(precision, jnp.result_type(*leaves))
        return LowRankKalman(mean, factor, diagonal)

    def predict(
        self, transition: ArrayLike = 1.0, noise: ArrayLike = 0.0
    ) -> "LowRankKalman":
        """The state after time has passed: ``θ ← γ θ`` and noise of variance ``q``.

        The covariance ``Σ ← γ²Σ + qI`` is of the same form again, exactly::

            Υ ← Υ / (γ² + qΥ)        W ← γ (γ² + qΥ)⁻¹ W (I + Wᵀ q/(γ² + qΥ) W)^(−½)

        Args:
            transition: ``γ``, one for parameters that keep their mean.
            noise: ``q``, zero for parameters that do not drift.
        """
        w, treedef = jax.tree.flatten(self.factor)
        gamma, noise = (jnp.asarray(x, jnp.result_type(*w)) for x in (transition, noise))
        spherical = self._is_spherical()
        d = [self.diagonal] * len(w) if spherical else jax.tree.leaves(self.diagonal)
        scale = [1 / (gamma**2 + noise * t) for t in d]
        rows = lambda t: t if t.ndim == 0 else t[..., None]
        scaled = [rows(s) * x for s, x in zip(scale, w, strict=True)]
        values, vectors = eigh(noise * tall_gram(w, scaled))
        roots = vectors / jnp.sqrt(1 + jnp.maximum(values, 0))[None]
        shrunk = tall_mix(scaled, gamma * einsum("rs,ts->rt", roots, vectors))
        return LowRankKalman(
            jax.tree.map(lambda x: gamma * x, self.mean),
            treedef.unflatten(shrunk),
            jax.tree.map(lambda t: t / (gamma**2 + noise * t), self.diagonal),
        )

    def update(
        self,
        model: Callable[[PyTree, PyTree], Float[Array, "b ..."]],
        x: PyTree,
        y: Float[Array, "b ..."],
        *,
        noise: ArrayLike = 1.0,
        likelihood: str = "gaussian",
    ) -> "LowRankKalman":
        """The state after a batch of samples, under ``jit``, ``scan`` and ``vmap``.

        Args:
            model: ``model(parameters, x)``, the outputs ``(b,)`` or ``(b, c)``.
            x: the samples, as the model takes them.
            y: the targets, of the shape of the outputs; of classes
                ``jax.nn.one_hot(labels, c)``.
            noise: the variance of a Gaussian target.
            likelihood: ``"gaussian"`` or ``"categorical"``: the outputs are logits, and the
                moments of the classes at the mean those of the noise, ``diag(p) − p pᵀ``.
                What is added to the precision is the Gauss-Newton matrix of the
                cross-entropy.

        Raises:
            ValueError: for targets of another shape than the outputs, or another
                likelihood.
        """
        outputs = model(self.mean, x)
        if y.shape != outputs.shape:
            raise ValueError(
                f"update needs targets of the shape of the outputs, {outputs.shape}, got "
                f"{y.shape}; of classes jax.nn.one_hot(labels, {outputs.shape[-1]})."
            )
        if likelihood not in ("gaussian", "categorical"):
            raise ValueError(
                f"likelihood must be 'gaussian' or 'categorical', got {likelihood!r}."
            )
        one = lambda params, x: model(params, jax.tree.map(lambda a: a[None], x))[0]
        jacobian = jax.vmap(jax.jacrev(one), (None, 0))(self.mean, x)
        axes = outputs.ndim
        if likelihood == "gaussian":
            variance = jnp.asarray(noise, outputs.dtype)
            force = (y - outputs) / variance
            whiten = lambda j: j / jnp.sqrt(variance)
        else:
            p = jax.nn.softmax(outputs)
            force = y - p
            # F = diag(√p) − p √pᵀ is a root of R, and of its pseudo-inverse between
            # softmax and logits: no matrix is inverted.
            whiten = lambda j: _on(jnp.sqrt(p), j - jnp.sum(_on(p, j), 1, keepdims=True))
        score = jax.tree.map(
            lambda j: jnp.tensordot(force, j, axes, precision=lax.Precision.HIGHEST),
            jacobian,
        )
        last = lambda j: jnp.moveaxis(j.reshape(-1, *j.shape[axes:]), 0, -1)
        rows = jax.tree.map(lambda j: last(whiten(j)), jacobian)
        return self._add(rows, score)

    def precision(self) -> LowRankPlusDiagonal:
        """``diag(Υ) + W Wᵀ``, an operator of lineax. Its inverse is the covariance."""
        rank = jax.tree.leaves(self.factor)[0].shape[-1]
        ones = jnp.ones(rank, jnp.result_type(*jax.tree.leaves(self.mean)))
        return LowRankPlusDiagonal(self.factor, ones, self.diagonal)

    def _add(self, rows: PyTree, score: PyTree) -> "LowRankKalman":
        """The state after observations with these whitened rows and this slope."""
        w, treedef = jax.tree.flatten(self.factor)
        rank = w[0].shape[-1]
        new = treedef.flatten_up_to(rows)
        wide = [jnp.concatenate(both, -1) for both in zip(w, new, strict=True)]
        u, values, _ = tall_svd(wide)
        spherical = self._is_spherical()
        if spherical:
            posterior = LowRankPlusDiagonal(
                treedef.unflatten(u), values**2, self.diagonal, orthonormal=True
            )
        else:
            ones = jnp.ones(wide[0].shape[-1], wide[0].dtype)
            posterior = LowRankPlusDiagonal(treedef.unflatten(wide), ones, self.diagonal)
        mean = jax.tree.map(jnp.add, self.mean, posterior.inverse().mv(score))
        scaled = tall_mix(u, jnp.diag(values))
        factor = treedef.unflatten([x[..., :rank] for x in scaled])
        diagonal = self.diagonal
        if not spherical:
            lost = treedef.unflatten([jnp.sum(x[..., rank:] ** 2, -1) for x in scaled])
            diagonal = jax.tree.map(jnp.add, diagonal, lost)
        return LowRankKalman(mean, factor, diagonal)

    def _is_spherical(self) -> bool:
        numbers, means = map(jax.tree.leaves, (self.diagonal, self.mean))
        return [x.shape for x in numbers] != [x.shape for x in means]


def _on(weights: Float[Array, "b c"], j: Float[Array, "b c *shape"]) -> Array:
    """A number for each output times its row of the Jacobian."""
    return weights.reshape(*weights.shape, *(1,) * (j.ndim - 2)) * j
