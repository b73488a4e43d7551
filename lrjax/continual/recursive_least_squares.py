import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from ..linalg import identity_like, nonzero


class RecursiveLeastSquares(eqx.Module):
    """A linear head that is fitted batch by batch, and is that of all batches together.

    After samples X and targets Y in any split and order the weight is the ridge regression
    ``argmin ‖X Wᵀ − Y‖² + λ ‖W‖²`` on all of them; none is kept. With ``R = (λI +
    XᵀX)⁻¹`` a batch is the step of recursive least squares::

        R ← R − R xᵀ (I + x R xᵀ)⁻¹ x R        Wᵀ ← Wᵀ + R xᵀ (y − x Wᵀ)

    which loses digits as ``κ(R)``, the square of that of the samples. Here the triangular
    root ``TᵀT = R⁻¹`` is kept, with ``Z = T Wᵀ``, and a batch is a QR factorization::

        [T Z; x y] = Q [T' Z'; 0 ·]

    It loses digits as ``κ(T)``. ``O(n² (n + b))`` for n features and b samples. A row of
    zeros in both is no sample: fill a short batch with them.

    Attributes:
        root: T ``(features, features)``, upper triangular.
        target: Z ``(features, outputs)``.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> x = jax.random.normal(jax.random.key(0), (40, 3))
        >>> y = x @ jnp.array([[1.0], [2.0], [3.0]])
        >>> head = lrjax.continual.RecursiveLeastSquares.start(3, 1, ridge=1e-6)
        >>> head = head.update(x[:10], y[:10]).update(x[10:], y[10:])
        >>> print(head.weight())
        [[1. 2. 3.]]

        New classes are outputs that all samples so far had zeros for:

        >>> head.with_outputs(2).weight().shape
        (2, 3)

    Reference:
        H. Zhuang, Y. Chen, D. Fang, R. He, K. Tong, H. Wei, Z. Zeng, C. Chen, "GACL:
        exemplar-free generalized analytic continual learning" (2024), arXiv 2403.15706.
        Special case: one batch is ridge regression.
    """

    root: Float[Array, "n n"]
    target: Float[Array, "n c"]

    @staticmethod
    def start(
        features: int, outputs: int, *, ridge: ArrayLike = 1.0, dtype=jnp.float32
    ) -> "RecursiveLeastSquares":
        """Before the first sample: the weight is zero.

        Args:
            features: how many numbers a sample has, a constant one for a bias included.
            outputs: how many classes or targets there are.
            ridge: λ, not negative.
            dtype: of the state, float32 or float64.
        """
        root = jnp.sqrt(jnp.asarray(ridge, dtype)) * jnp.eye(features, dtype=dtype)
        return RecursiveLeastSquares(root, jnp.zeros((features, outputs), dtype))

    def update(
        self, x: Float[Array, "b n"], y: Float[Array, "b c"]
    ) -> "RecursiveLeastSquares":
        """The head after a batch of samples, under ``jit``, ``scan`` and ``vmap``.

        Args:
            x: the samples.
            y: their targets; of classes ``jax.nn.one_hot(labels, outputs)``.

        Raises:
            ValueError: for samples or targets of another length.
        """
        (n, c), dtype = self.target.shape, self.target.dtype
        if x.shape[1:] != (n,) or y.shape != (len(x), c):
            raise ValueError(
                f"A head of {n} features and {c} outputs takes x of shape (batch, {n}) and "
                f"y of shape (batch, {c}), got {x.shape} and {y.shape}. More outputs: "
                "with_outputs."
            )
        old = jnp.concatenate([self.root, self.target], axis=1)
        new = jnp.concatenate([x.astype(dtype), y.astype(dtype)], axis=1)
        return self._of(jnp.concatenate([old, new]))

    def weight(self) -> Float[Array, "c n"]:
        """The weight, ``(outputs, features)`` as a linear layer has it.

        What neither samples nor a ridge determine is arbitrary, but finite.
        """
        # Far enough below the rounding of a well-determined weight to change none.
        largest = jnp.max(jnp.abs(self.root))
        floor = nonzero(jnp.finfo(self.root.dtype).eps * largest) * identity_like(self.root)
        below = jnp.concatenate([floor, jnp.zeros_like(self.target)], axis=1)
        old = jnp.concatenate([self.root, self.target], axis=1)
        safe = self._of(jnp.concatenate([old, below]))
        return lax.linalg.triangular_solve(safe.root, safe.target, left_side=True).T

    def with_outputs(self, outputs: int) -> "RecursiveLeastSquares":
        """The head with more outputs: the samples so far had zeros for the new ones.

        Raises:
            ValueError: for fewer than there are.
        """
        more = outputs - self.target.shape[1]
        if more < 0:
            raise ValueError(
                f"with_outputs adds outputs to the {self.target.shape[1]} that there are, "
                f"got {outputs}."
            )
        return RecursiveLeastSquares(self.root, jnp.pad(self.target, ((0, 0), (0, more))))

    def _of(self, rows: Float[Array, "m k"]) -> "RecursiveLeastSquares":
        """The root and the target of stacked ones."""
        n = len(self.root)
        upper = jnp.linalg.qr(rows, mode="r")[:n]
        return RecursiveLeastSquares(upper[:, :n], upper[:, n:])
