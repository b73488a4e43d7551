"""Where the factors of an adapter start: what ``LoRA(init=…)`` may be."""

import abc
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from ...._sites import Site
from ...._tree import like
from ....linalg import working_dtype
from ....lowrank import (
    LowRank,
    gaussian_init,
    lora_init,
    orthogonal_init,
    qr_init,
    svd_init,
)
from ..._settings import check_fits, kaiming_uniform


Train = Literal["both", "left", "right"]


class Start(eqx.Module):
    """Where factors start; a subclass of one method is a new one, ``LoRA(init=Own())``.

    Attributes:
        residual: whether the change at the start is taken off again by a frozen copy of
            the factors, so that the adapted weight starts as the weight.
        takes_data: whether ``pair`` needs the statistic of its matrix,
            ``lrjax.adapt(…, data={path: statistic})``.
    """

    residual: ClassVar[bool] = False
    takes_data: ClassVar[bool] = False

    @abc.abstractmethod
    def pair(
        self,
        site: Site,
        rank: int,
        *,
        scale: Array,
        train: Train,
        key: PRNGKeyArray,
        data: Any,
    ) -> LowRank:
        """``left = B (out, rank)`` and ``right = Aᵀ (in, rank)`` for one matrix.

        Args:
            site: ``site.shape`` is ``(out, in)``, ``site.read()`` the weight.
            rank: the width.
            scale: what the product is multiplied with in the change.
            train: which factors are trained.
            key: for random numbers.
            data: the statistic, where ``takes_data``.
        """


class ZeroStart(Start):
    """One factor random, the other zero: the one that is trained, if only one is.

    ``A`` is uniform in ``±1/√in``, or normal with deviation ``1/rank``, and ``B = 0``. For
    an embedding ``A = 0`` and B is standard normal.

    Args:
        normal: whether A is normal.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Linear(4, 3, key=jax.random.key(0))
        >>> kind = lrjax.LoRA(2, init=lrjax.adapters.ZeroStart(normal=True))  # "gaussian"
        >>> adapters = lrjax.adapt(model, kind, key=jax.random.key(1))
        >>> float(abs(adapters[""].pair.left).max())
        0.0

    Reference:
        E. Hu et al., "LoRA: low-rank adaptation of large language models" (2021),
        arXiv:2106.09685; the numbers are PEFT's.
    """

    normal: bool = eqx.field(static=True, default=False)

    def pair(self, site, rank, *, scale, train, key, data):
        """The random factor and the zero one."""
        (m, n), dtype = site.shape, working_dtype(site.dtype)
        lookup = site.kind == "lookup"
        if train == "left" or (train == "both" and not lookup):
            if not self.normal:
                return lora_init((m, n), rank, key=key, dtype=dtype)
            right = jr.normal(key, (n, rank), dtype) / rank
            return LowRank(jnp.zeros((m, rank), dtype), right)
        if lookup:
            left = jr.normal(key, (m, rank), dtype)
        elif self.normal:
            left = jr.normal(key, (m, rank), dtype) / rank
        else:
            left = kaiming_uniform(key, (m, rank), rank, dtype)
        return LowRank(left, jnp.zeros((n, rank), dtype))


class OrthogonalStart(Start):
    """Both factors random and their product zero: both have a gradient at once.

    The columns of an orthogonal matrix ``(r, r)`` are dealt out to the two sides, so r is
    even.

    Args:
        size: of the numbers.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Linear(4, 3, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(
        ...     model, lrjax.LoRA(2, init="orthogonal"), key=jax.random.key(1))
        >>> bool(abs(adapters[""].pair.materialize()).max() < 1e-8)
        True

    Reference:
        The "orthogonal" initialization of PEFT.
    """

    size: ArrayLike = 0.1

    def pair(self, site, rank, *, scale, train, key, data):
        """The two factors."""
        dtype = working_dtype(site.dtype)
        return orthogonal_init(site.shape, rank, self.size, key=key, dtype=dtype)


class SmallStart(Start):
    """Both factors normal and small, next to the saddle at zero; the change is not zero.

    Gradient flow from there first turns the factors towards the leading singular vectors
    of the gradient, then fits.

    Args:
        std: the deviation of the numbers.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Linear(4, 3, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(
        ...     model, lrjax.LoRA(2, init="small"), key=jax.random.key(1))
        >>> bool(abs(adapters[""].pair.left).max() < 0.01)
        True

    Reference:
        Z. Xu et al., "Understanding the learning dynamics of LoRA: a gradient flow
        perspective on low-rank adaptation in matrix factorization" (2025),
        arXiv:2503.06982.
    """

    std: ArrayLike = 1e-3

    def pair(self, site, rank, *, scale, train, key, data):
        """The two factors."""
        dtype = working_dtype(site.dtype)
        return gaussian_init(site.shape, rank, self.std, key=key, dtype=dtype)


class SingularStart(Start):
    """Along singular vectors of the weight: ``B = U √(Σ/s)`` and ``A = √(Σ/s) Vᵀ``.

    The largest are the principal part of the weight (PiSSA), which is then trained itself;
    the smallest the part that matters least to it (MiLoRA).

    Args:
        which: the ``"largest"`` or the ``"smallest"``.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Linear(4, 3, key=jax.random.key(0))
        >>> kind = lrjax.LoRA(2, init=lrjax.adapters.SingularStart("smallest"))  # "milora"
        >>> adapters = lrjax.adapt(model, kind, key=jax.random.key(1))
        >>> adapters[""].start.shape
        (3, 4)

    Reference:
        F. Meng, Z. Wang, M. Zhang, "PiSSA: principal singular values and singular vectors
        adaptation of large language models" (2024), arXiv:2404.02948; H. Wang et al.,
        "MiLoRA: harnessing minor singular components for parameter-efficient LLM
        finetuning" (2024), arXiv:2406.09044.
    """

    which: Literal["largest", "smallest"] = eqx.field(static=True, default="largest")
    residual: ClassVar[bool] = True

    def pair(self, site, rank, *, scale, train, key, data):
        """Balanced factors of a part of the weight."""
        check_fits('LoRA(init="pissa" or "milora")', rank, site)
        return svd_init(site.read(), rank, scale=scale**-0.5, which=self.which)


class QRStart(Start):
    """The QR decomposition of the weight: ``B = Q[:, :r]`` orthonormal, ``A = R[:r]``.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Linear(4, 3, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(
        ...     model, lrjax.LoRA(2, init="olora"), key=jax.random.key(1))
        >>> left = adapters[""].pair.left
        >>> bool(abs(left.T @ left - jax.numpy.eye(2)).max() < 1e-5)
        True

    Reference:
        K. Büyükakyüz, "OLoRA: orthonormal low-rank adaptation of large language models"
        (2024), arXiv:2406.01775.
    """

    residual: ClassVar[bool] = True

    def pair(self, site, rank, *, scale, train, key, data):
        """The first columns of Q and rows of R."""
        check_fits('LoRA(init="olora")', rank, site)
        return qr_init(site.read(), rank)


class ScaledStart(Start):
    """Another start with its two factors multiplied by a number each.

    ``B = left · B₀`` and ``A = right · A₀``, where ``B₀`` and ``A₀`` are what ``start``
    gives for the scale ``s · left · right``: so the change that it starts with depends on
    that product of the three numbers alone.

    Args:
        start: the other one.
        left: multiplies ``B``.
        right: multiplies ``A``.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Linear(4, 3, key=jax.random.key(0))
        >>> start = lrjax.adapters.ScaledStart(lrjax.adapters.ZeroStart(), right=10.0)
        >>> adapters = lrjax.adapt(model, lrjax.LoRA(2, init=start), key=jax.random.key(1))
        >>> bool(abs(adapters[""].pair.right).max() > 2)  # it is at most 1/2 without
        True

    Reference:
        Z. Zhang et al., "The primacy of magnitude in low-rank adaptation" (2025),
        arXiv:2507.06558.
    """

    start: Start
    left: ArrayLike = 1.0
    right: ArrayLike = 1.0

    @property
    def residual(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether that of the other start is taken off."""
        return self.start.residual

    @property
    def takes_data(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the other start does."""
        return self.start.takes_data

    def pair(self, site, rank, *, scale, train, key, data):
        """The factors of the other start, scaled."""
        scale = scale * self.left * self.right
        pair = self.start.pair(site, rank, scale=scale, train=train, key=key, data=data)
        left, right = (
            jnp.multiply(self.left, pair.left),
            jnp.multiply(self.right, pair.right),
        )
        return like(pair, left, right)
