"""Where factors start by what data say of a matrix: its gradient, or its inputs."""

from typing import Any, ClassVar, Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from ...._sites import InputStatistic, Site
from ....linalg import nonzero, working_dtype
from ....lowrank import LowRank, disjoint_svd_init, svd_init, weighted_svd_init
from .start import Start


class GradientStart(Start):
    """Along different singular vectors of the gradient on each side, taken off again.

    ``B = c U_{r+1…2r}`` and ``A = c V_{1…r}ᵀ`` with ``c = out^¼ / √gamma``: the first step
    of gradient descent moves the weight along the best approximation of rank 2r of the
    gradient. Data are gradients.

    Args:
        gamma: of the size.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> model = eqx.nn.Linear(4, 3, key=jax.random.key(0))
        >>> kind = lrjax.LoRA(1, init="lora_ga")
        >>> adapters = lrjax.adapt(
        ...     model, kind, data={"": jnp.eye(3, 4)}, key=jax.random.key(1))
        >>> adapters[""].start.shape
        (3, 4)

    Reference:
        S. Wang, L. Yu, J. Li, "LoRA-GA: low-rank adaptation with gradient approximation"
        (2024), arXiv:2407.05000; the sizes are those of its own code.
    """

    gamma: ArrayLike = 16.0
    residual: ClassVar[bool] = True
    takes_data: ClassVar[bool] = True

    def pair(self, site, rank, *, scale, train, key, data):
        """The two sides."""
        gradient = _gradient("lora_ga", site, data)
        size = site.shape[0] ** 0.25 / jnp.sqrt(self.gamma)
        return disjoint_svd_init(gradient, rank, scale=size)


class StepStart(Start):
    """One step down the gradient, of the given rank: the weight starts *changed* by it.

    ``B A = (−G)_r / (gamma σ₁)``, balanced, with the leading singular triplets of the
    gradient; the spectral norm is ``1/gamma`` whatever the size of the gradient. Nothing
    is taken off. Data are gradients.

    Args:
        gamma: of the size.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> model = eqx.nn.Linear(4, 3, key=jax.random.key(0))
        >>> kind = lrjax.LoRA(1, init="lora_one")
        >>> adapters = lrjax.adapt(
        ...     model, kind, data={"": jnp.eye(3, 4)}, key=jax.random.key(1))
        >>> print(adapters[""].pair.materialize().min())
        -0.0078125

    Reference:
        Y. Zhang, F. Liu, Y. Chen, "LoRA-One: one-step full gradient could suffice for
        fine-tuning large language models, provably and efficiently" (2025),
        arXiv:2502.01235.
    """

    gamma: ArrayLike = 128.0
    takes_data: ClassVar[bool] = True

    def pair(self, site, rank, *, scale, train, key, data):
        """The balanced factors of the step."""
        pair = svd_init(_negative(_gradient("lora_one", site, data)), rank)
        largest = jnp.sum(pair.left[:, 0] ** 2)
        size = 1 / jnp.sqrt(self.gamma * nonzero(largest))
        return LowRank(size * pair.left, size * pair.right)


class SpectralStart(Start):
    """Small factors along the leading singular vectors of the negative gradient.

    ``B = size · U_r`` and ``A = size · V_rᵀ``: where a small random start would turn to by
    itself, without the time that it takes. Data are gradients.

    Args:
        size: the length of the columns.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> model = eqx.nn.Linear(4, 3, key=jax.random.key(0))
        >>> kind = lrjax.LoRA(1, init=lrjax.adapters.SpectralStart(1e-2))
        >>> adapters = lrjax.adapt(
        ...     model, kind, data={"": jnp.eye(3, 4)}, key=jax.random.key(1))
        >>> print(adapters[""].pair.materialize().min())
        -0.0001

    Reference:
        Z. Xu et al., "Understanding the learning dynamics of LoRA: a gradient flow
        perspective on low-rank adaptation in matrix factorization" (2025),
        arXiv:2503.06982.
    """

    size: ArrayLike = 1e-3
    takes_data: ClassVar[bool] = True

    def pair(self, site, rank, *, scale, train, key, data):
        """The two sides."""
        step = _negative(_gradient("spectral", site, data))
        return svd_init(step, rank, scale=self.size, power=0.0)


class VarianceStart(Start):
    """A along the directions in which the inputs vary most, ``B = 0``.

    The rows of A are orthonormal, the leading eigenvectors of the covariance of the
    inputs. Data are from :func:`lrjax.adapters.activation_statistics`, with a rank of its
    own for each layer from :func:`lrjax.adapters.ranks_by_variance`.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Linear(4, 3, key=jax.random.key(0))
        >>> batches = jax.random.normal(jax.random.key(1), (2, 9, 4))
        >>> data = lrjax.adapters.activation_statistics(
        ...     lambda model, x: jax.vmap(model)(x), model, batches)
        >>> kind = lrjax.LoRA(2, init="eva")
        >>> adapters = lrjax.adapt(model, kind, data=data, key=jax.random.key(2))
        >>> right = adapters[""].pair.right
        >>> bool(abs(right.T @ right - jax.numpy.eye(2)).max() < 1e-5)
        True

    Reference:
        F. Paischer et al., "One initialization to rule them all: fine-tuning via explained
        variance adaptation" (2024), arXiv:2410.07170.
    """

    takes_data: ClassVar[bool] = True

    def pair(self, site, rank, *, scale, train, key, data):
        """The directions, and zeros."""
        _, vectors = _inputs("eva", site, data).principal()
        if rank > vectors.shape[1]:
            raise ValueError(
                f'LoRA(init="eva") takes directions of the inputs, and the data of '
                f"{site.path or 'the root'} {site.shape} hold {vectors.shape[1]} of them, "
                f"less than rank={rank}."
            )
        zeros = jnp.zeros((site.shape[0], rank), vectors.dtype)
        return LowRank(zeros, vectors[:, :rank])


class WeightedStart(Start):
    """The part of the weight that matters most, or least, for its inputs.

    With ``W C = U Σ Vᵀ`` and C the second moment of the inputs, damped:
    ``B = U_r √(Σ_r/s)`` and ``A = √(Σ_r/s) V_rᵀ C⁻¹``, taken off again. The largest are
    what the inputs use, to be trained for a task like theirs; the smallest leave what they
    use as it is, to keep what the model knows about them. Data are from
    :func:`lrjax.adapters.activation_statistics` without a rank.

    Args:
        which: the ``"largest"`` ("corda") or the ``"smallest"`` ("corda_kpm").
        damping: added to the diagonal of C, relative to its mean.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Linear(4, 3, key=jax.random.key(0))
        >>> batches = jax.random.normal(jax.random.key(1), (2, 9, 4))
        >>> data = lrjax.adapters.activation_statistics(
        ...     lambda model, x: jax.vmap(model)(x), model, batches)
        >>> kind = lrjax.LoRA(2, init=lrjax.adapters.WeightedStart("smallest"))
        >>> adapters = lrjax.adapt(model, kind, data=data, key=jax.random.key(2))

    Reference:
        Y. Yang et al., "CorDA: context-oriented decomposition adaptation of large language
        models" (2024), arXiv:2406.05223. PEFT doubles the damping until C can be inverted
        by LU; here its eigenvectors invert it.
    """

    which: Literal["largest", "smallest"] = eqx.field(static=True, default="largest")
    damping: ArrayLike = 0.01
    residual: ClassVar[bool] = True
    takes_data: ClassVar[bool] = True

    def pair(self, site, rank, *, scale, train, key, data):
        """The factors of that part."""
        moment = _inputs("corda", site, data).second_moment()
        return weighted_svd_init(
            site.read(),
            moment,
            rank,
            scale=scale**-0.5,
            damping=self.damping,
            which=self.which,
        )


def _gradient(name: str, site: Site, data: Any) -> Array | LowRank:
    if getattr(data, "shape", None) != site.shape:
        raise TypeError(
            f'LoRA(init="{name}") starts from the gradient of {site.path or "the root"}, '
            f"of shape {site.shape} for one matrix, as lrjax.adapters.gradient_statistics "
            f"gives it; data= has {data!r}."
        )
    if isinstance(data, LowRank):
        return data
    return jnp.asarray(data, working_dtype(data.dtype))


def _negative(gradient: Array | LowRank) -> Array | LowRank:
    if isinstance(gradient, LowRank):
        return LowRank(-gradient.left, gradient.right)
    return -gradient


def _inputs(name: str, site: Site, data: Any) -> InputStatistic:
    if not isinstance(data, InputStatistic) or len(data.total) != site.shape[1]:
        raise TypeError(
            f'LoRA(init="{name}") starts from the inputs of {site.path or "the root"}, of '
            f"length {site.shape[1]}, as lrjax.adapters.activation_statistics gives them; "
            f"data= has {data!r}."
        )
    return data
