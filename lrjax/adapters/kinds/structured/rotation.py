import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float

from ...._sites import Site
from ....linalg import identity_like, outer, times, truncated_svd, working_dtype
from ....lowrank import LowRank
from ..._settings import as_dtype, as_number, as_rate, checked_dropout
from ...protocol import Adapter, AdapterKind, Added, Ready, Whole, trained
from ..core.adapter import Core
from .kronecker import split


class Rotation(Adapter):
    """The inputs turned, ``W' = V Rᵀ``, or the outputs, ``W' = Rᵀ V``.

    ``R`` is block diagonal or a Kronecker product, and ``V`` is W, or what a trained
    spectrum makes of it.

    Attributes:
        angles: the upper triangles of the skew matrices that make the rotations, trained:
            ``(*b, blocks, size (size − 1) / 2)``, or an array for each Kronecker factor.
        spectrum: of W, or ``None`` where it stays as it is.
        sides: outputs and inputs.
        of_outputs: whether the outputs are turned.
        terms: of the Neumann series, or ``None`` for the exact inverse.
    """

    angles: Float[Array, "*b blocks pairs"] | tuple[Float[Array, "*b _"], ...]
    rate: Float[Array, "*b"] | None
    sides: tuple[int, int] = eqx.field(static=True)
    of_outputs: bool = eqx.field(static=True)
    terms: int | None = eqx.field(static=True, default=None)
    spectrum: Core | None = None

    @property
    def shape(self):
        """Outputs by inputs."""
        if self.spectrum is not None:
            return self.spectrum.shape
        assert not isinstance(self.angles, tuple)
        return (*self.angles.shape[:-2], *self.sides)

    def dropout_rate(self):
        """The rate."""
        return self.rate

    def trainable(self):
        """The angles, and the singular values."""
        if self.spectrum is None:
            return trained(self, lambda own: own.angles)
        return trained(self, lambda own: own.angles, lambda own: own.spectrum.core)

    def prepare(self, site, pool=None):
        """The rotations, from the angles, and the dense change of the spectrum."""
        make = lambda angles, size: cayley(skew(angles, size), self.terms)
        side = self.sides[0] if self.of_outputs else self.sides[1]
        if isinstance(self.angles, tuple):
            sizes = kronecker_sizes(side)
            turns = tuple(make(*of) for of in zip(self.angles, sizes, strict=True))
        else:
            turns = make(self.angles, side // self.angles.shape[-2])
        if self.spectrum is None:
            return Turned(turns, self.of_outputs)
        found = self.spectrum.factors()
        assert found is not None  # it has no pool
        delta = outer(found[0].left, found[0].right)
        return Turned(turns, self.of_outputs, Added(delta))


def kronecker_sizes(side: int) -> tuple[int, ...]:
    """Three factors of a side near its cube root, without those of one."""
    upto = math.isqrt(side) + 1
    first = max(d for d in range(1, upto) if d**3 <= side and side % d == 0)
    return tuple(size for size in (first, *split(side // first, None)) if size > 1)


class Turned(Whole):
    """The inputs, or the outputs, of a layer or of another adapter turned."""

    turns: Float[Array, "blocks size size"] | tuple[Float[Array, "_ _"], ...]
    of_outputs: bool = eqx.field(static=True)
    inner: Ready | None = None

    def turn(self, x: Float[Array, "*c side"]) -> Float[Array, "*c side"]:
        """``Rᵀ x``, each block, or each axis of a tensor, by its own rotation."""
        lead, turns = x.shape[:-1], self.turns
        if not isinstance(turns, tuple):
            parts = x.reshape(*lead, *turns.shape[:2])
            y = jnp.einsum("...nk,nkc->...nc", parts, turns.astype(x.dtype))
            return y.reshape(x.shape)
        y = x.reshape(*lead, *(len(q) for q in turns))
        for axis, q in enumerate(turns, len(lead)):
            turned = jnp.tensordot(y, q.astype(x.dtype), (axis, 0))
            y = jnp.moveaxis(turned, -1, axis)
        return y.reshape(x.shape)

    def weight(self, base):
        """The rows by the transposed rotations, or the columns."""
        base = base if self.inner is None else self.inner.weight(base)
        if self.of_outputs:
            return self.turn(base.T).T
        back = Turned(jax.tree.map(lambda q: q.mT, self.turns), of_outputs=False)
        return back.turn(base)

    def output(self, site, x):
        """The layer, before or after the turn; of other layers the dense weight."""
        if self.of_outputs and site.kind in ("linear", "lookup"):
            return self.turn(self._inner_output(site, x))
        if not self.of_outputs and site.kind == "linear":
            return self._inner_output(site, self.turn(jnp.atleast_1d(x)))
        return super().output(site, x)

    def _inner_output(self, site: Site, x: Array) -> Array:
        return site.base(x) if self.inner is None else self.inner.output(site, x)


def skew(angles: Float[Array, "*b pairs"], size: int) -> Float[Array, "*b size size"]:
    """Matrices ``Q = −Qᵀ`` with the numbers of their upper triangles, row by row."""
    rows, cols = jnp.triu_indices(size, 1)
    upper = jnp.zeros((*angles.shape[:-1], size, size), working_dtype(angles.dtype))
    upper = upper.at[..., rows, cols].set(angles.astype(upper.dtype))
    return upper - upper.mT


def cayley(q: Float[Array, "*b n n"], terms: int | None = None) -> Float[Array, "*b n n"]:
    """The rotation ``(I + Q)(I − Q)⁻¹`` of a skew Q, or ``I + 2Q + … + 2Qᵗ⁻² + Qᵗ⁻¹``."""
    one = identity_like(q)
    if terms is None:
        return jnp.linalg.solve(one - q, one + q)
    total, power = one + 2 * q, q
    for term in range(2, terms):
        power = times(power, q)
        total = total + (power if term == terms - 1 else 2 * power)
    return total


class OFT(AdapterKind):
    """Orthogonal fine-tuning: the inputs of a weight turned, block by block.

    ``W' = W Rᵀ`` with ``R = diag(R_1, …, R_k)`` and ``R_j = (I + Q_j)(I − Q_j)⁻¹`` the
    Cayley transform of a skew ``Q_j (b, b)`` from zero: ``in (b − 1) / 2`` numbers. Rows of
    W keep their lengths and angles. A linear layer meets the turned input, and the
    rotations are made once a bind. Of an embedding the outputs are turned, of a convolution
    the flattened kernel.

    Args:
        size: b, of the blocks; it must divide the side that is turned.
        terms: of the series ``I + 2Q + … + 2Qᵗ⁻² + Qᵗ⁻¹`` in place of the inverse, at least
            2: cheaper, and orthogonal only for small Q. PEFT has 5 by default.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of the angles, by default that of each weight.

    Raises:
        ValueError: for a size or terms below 2, a dropout outside [0, 1); in
            :func:`lrjax.adapt`, for a size that does not divide the side.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Linear(12, 8, key=jax.random.key(0))
        >>> kind = lrjax.adapters.OFT(size=4)
        >>> adapters = lrjax.adapt(model, kind, key=jax.random.key(1))
        >>> adapters[""].angles.shape
        (3, 6)

    Reference:
        Z. Qiu et al., "Controlling text-to-image diffusion by orthogonal finetuning"
        (2023), arXiv:2306.07280; of the inputs, with the series: Z. Qiu et al., "Orthogonal
        finetuning made scalable" (2025), arXiv:2506.19847.
    """

    size: int = eqx.field(static=True)
    terms: int | None = eqx.field(static=True)
    dropout: ArrayLike | None
    dtype: DTypeLike | None = eqx.field(static=True)

    def __init__(
        self,
        size: int = 32,
        *,
        terms: int | None = None,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        for name, value in (("size", size), ("terms", terms)):
            if value is not None and value < 2:
                raise ValueError(f"OFT's {name} must be at least 2, got {value}.")
        self.size, self.terms = size, terms
        self.dropout, self.dtype = checked_dropout("OFT", dropout), dtype

    def init(self, site, *, key=None, pool=None, data=None):
        """Rotations by nothing."""
        of_outputs = site.kind == "lookup"
        side = site.shape[0] if of_outputs else site.shape[1]
        if side % self.size:
            raise ValueError(
                f"OFT turns blocks of one size, and size={self.size} does not divide the "
                f"{side} {'outputs' if of_outputs else 'inputs'} of "
                f"{site.path or 'the root'}: choose another size, for this layer alone by "
                "a rule (path, site) -> kind."
            )
        shape = (side // self.size, self.size * (self.size - 1) // 2)
        angles = jnp.zeros(shape, as_dtype(self.dtype, site))
        rate = as_rate(self.dropout, angles.dtype)
        return Rotation(angles, rate, site.shape, of_outputs, self.terms)


class SODA(AdapterKind):
    """Spectral adaptation: singular values of a weight trained, and its inputs turned.

    With ``W = U S Vᵀ``: ``W' = U relu(S + δ) Vᵀ Qᵀ``, where ``δ`` has a number for each of
    the ``min(out, in)`` singular values, and ``Q = Q_1 ⊗ Q_2 ⊗ Q_3`` is orthogonal, of
    sizes near the cube root of the inputs (fewer where these are prime). ``Q_k`` is the
    Cayley transform of a skew matrix, the identity at the start, so it stays orthogonal
    with any optimizer, where the paper moves it along the Stiefel manifold:
    ``min(out, in) + Σ_k q_k (q_k − 1) / 2`` numbers a matrix. Of an embedding the outputs
    are turned, of a convolution the flattened kernel.

    All of U and V is kept in the adapter, and the dense change of the spectrum formed once
    a bind, in ``2 min(out, in) out in`` flops. Singular values that are zero have a
    gradient only with a positive ``start``.

    Args:
        start: of δ. 0 is the model as it is; the paper has 1e-3.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of the arrays, by default that of each weight.

    Raises:
        ValueError: for a dropout outside [0, 1).

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Linear(12, 8, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.adapters.SODA(), key=jax.random.key(1))
        >>> [x.shape for x in jax.tree.leaves(lrjax.partition(adapters)[0])]
        [(1,), (1,), (3,), (8,)]

    Reference:
        X. Zhang et al., "Spectrum-aware parameter efficient fine-tuning for diffusion
        models" (2024), arXiv:2405.21050. With a prime number of inputs and δ = 0 it is
        :class:`lrjax.adapters.OFT` of one block, and with no rotation
        :class:`lrjax.adapters.SVFit` of all singular values.
    """

    start: ArrayLike
    dropout: ArrayLike | None
    dtype: DTypeLike | None = eqx.field(static=True)

    def __init__(
        self,
        start: ArrayLike = 0.0,
        *,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        self.start = start
        self.dropout, self.dtype = checked_dropout("SODA", dropout), dtype

    def init(self, site, *, key=None, pool=None, data=None):
        """All singular vectors, and rotations by nothing."""
        dtype = as_dtype(self.dtype, site)
        of_outputs = site.kind == "lookup"
        side = site.shape[0] if of_outputs else site.shape[1]
        sizes = kronecker_sizes(side)
        angles = tuple(jnp.zeros(size * (size - 1) // 2, dtype) for size in sizes)
        found = truncated_svd(site.read(), min(site.shape))
        u, values, v = (x.astype(dtype) for x in found)
        core, one = values + jnp.asarray(self.start, dtype), as_number(1.0, dtype)
        spectrum = Core(LowRank(u, v), core, values, one, None, positive=True)
        rate = as_rate(self.dropout, dtype)
        return Rotation(angles, rate, site.shape, of_outputs, spectrum=spectrum)
