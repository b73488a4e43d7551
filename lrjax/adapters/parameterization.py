"""Scale, sizes of the start and rates of two factors: one family, converted exactly."""

import math
from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple, cast, get_args

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import ArrayLike, PyTree

from ..lowrank import is_low_rank
from .kinds import LoRA
from .kinds.starts import ScaledStart


Moments = Literal["sgd", "adam"]


class FactorSettings(NamedTuple):
    """Where one factor starts and how it is trained.

    Attributes:
        rate: the learning rate.
        size: what its start is multiplied with.
        eps: of the Adam family.
        weight_decay: decoupled, as of AdamW: the step is
            ``−rate · (u + weight_decay · F)``.
        coupled_weight_decay: added to the gradient, ``G + coupled_weight_decay · F``.
    """

    rate: ArrayLike
    size: ArrayLike = 1.0
    eps: ArrayLike = 1e-8
    weight_decay: ArrayLike = 0.0
    coupled_weight_decay: ArrayLike = 0.0


class Parameterization(NamedTuple):
    """How a change ``s · left rightᵀ`` is started and trained; LoRA has ``left = B``.

    A tree of numbers, which may be tracers: it goes through ``vmap`` and ``lrjax.sweep``.

    Attributes:
        scale: ``s``.
        left: of ``left = B (out, r)``.
        right: of ``right = Aᵀ (in, r)``.
        rest: of all leaves that are no factors.

    Example:
        >>> import equinox as eqx, jax, optax, lrjax
        >>> lora_plus = lrjax.adapters.Parameterization.of(1e-3, ratio=16.0)
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> kind = lora_plus.kind(lrjax.LoRA(rank=2))
        >>> params, frozen = lrjax.partition(
        ...     lrjax.adapt(model, kind, key=jax.random.key(1)))
        >>> tx = lora_plus.optimizer(lambda eps: optax.scale_by_adam(eps=eps))
        >>> state = tx.init(params)
    """

    scale: ArrayLike
    left: FactorSettings
    right: FactorSettings
    rest: FactorSettings

    @classmethod
    def of(
        cls,
        learning_rate: ArrayLike,
        *,
        scale: ArrayLike = 1.0,
        ratio: ArrayLike = 1.0,
        eps: ArrayLike = 1e-8,
        weight_decay: ArrayLike = 0.0,
        coupled_weight_decay: ArrayLike = 0.0,
    ) -> "Parameterization":
        """The usual one: everything alike, but for the ratio of the two rates.

        Args:
            learning_rate: of ``right = Aᵀ`` and of what is no factor.
            scale: ``s``: ``alpha / r`` of LoRA, ``alpha / √r`` of rsLoRA.
            ratio: the rate of ``left = B`` over that of ``right`` (LoRA+).
            eps: of the Adam family.
            weight_decay: decoupled.
            coupled_weight_decay: added to the gradient.

        Returns:
            The parameterization, with sizes of one.
        """
        own = FactorSettings(learning_rate, 1.0, eps, weight_decay, coupled_weight_decay)
        left = own._replace(rate=ratio * learning_rate)
        return cls(scale, left, own, own._replace(weight_decay=0.0))

    def kind(self, kind: LoRA) -> LoRA:
        """The same kind of adapter with this scale, and its start in these sizes.

        Args:
            kind: rank, start, dropout and dtype are taken from it, ``alpha`` is not.

        Returns:
            A kind for :func:`lrjax.adapt`.

        Raises:
            TypeError: for another kind than LoRA.
        """
        if not isinstance(kind, LoRA):
            raise TypeError(
                f"A Parameterization sets the scale and the start of lrjax.LoRA, got "
                f"{kind!r}."
            )
        alpha = self.scale * (math.sqrt(kind.rank) if kind.rank_stabilized else kind.rank)
        start = ScaledStart(kind.start, self.left.size, self.right.size)
        where = lambda k: (k.alpha, k.start)
        return eqx.tree_at(where, kind, (alpha, start), is_leaf=lambda x: x is None)

    def optimizer(
        self, moments: Callable[[Any], optax.GradientTransformation]
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer in which every factor has its own rate, eps and weight decay.

        ``moments`` stands between the two weight decays, for each factor on its own. For
        :func:`lrjax.scale_by_gram`, which needs both, chain it before. A schedule is
        chained after: it multiplies all rates alike.

        Args:
            moments: ``eps -> transform``, of each leaf alone: for instance
                ``lambda eps: optax.scale_by_adam(eps=eps)``, or
                ``lambda eps: optax.trace(0.9)``.

        Returns:
            An optax transform; ``update`` needs ``params``.
        """
        each: dict[Hashable, optax.GradientTransformation] = {
            name: _chain(own, moments)
            for name, own in zip(self._fields[1:], self[1:], strict=True)
        }
        return optax.partition(each, _labels)


def _chain(own: FactorSettings, moments: Callable) -> optax.GradientTransformationExtraArgs:
    number = lambda x: cast(float, x)  # or a tracer: optax names the first alone
    return optax.chain(
        optax.add_decayed_weights(number(own.coupled_weight_decay)),
        moments(own.eps),
        optax.add_decayed_weights(number(own.weight_decay)),
        optax.scale_by_learning_rate(number(own.rate)),
    )


def _labels(params: PyTree) -> PyTree:
    """Whether a leaf is a left or a right factor, or no factor."""
    name = lambda path, _: path[0].name
    label = lambda x: jtu.tree_map_with_path(name, x) if is_low_rank(x) else "rest"
    return jax.tree.map(label, params, is_leaf=is_low_rank)


def equivalent_hyperparameters(
    old: Parameterization,
    moments: Moments = "adam",
    *,
    whitened: bool = False,
    scale: ArrayLike | None = None,
    ratio: ArrayLike | None = None,
    left_size: ArrayLike | None = None,
    right_size: ArrayLike | None = None,
) -> Parameterization:
    """Another scale, start or ratio of rates, and what gives the same training with it.

    The change of the weight is ``s · left rightᵀ``. Take ``left' = c_l left``,
    ``right' = c_r right`` and ``s' = s / (c_l c_r)``: it stays as it is if every step
    does. The gradient of ``left'`` is ``g = 1/c_l`` times that of ``left``, and so with
    ``c_r`` for ``right'``. Hence, of each factor, in every step and to rounding::

                         "sgd"          "adam"
        rate'            c² rate        c rate
        eps'                            eps / c
        weight_decay'    wd / c²        wd / c
        coupled'         wd / c²        wd / c²

    Momentum, Nesterov's as well, ``b1`` and ``b2`` stay. Without ``eps'`` the runs of Adam
    differ by a multiple of eps. After :func:`lrjax.scale_by_gram` with a relative damping
    (``whitened``) the gradient of ``left'`` is ``g = 1 / (c_r² c_l)`` times that of
    ``left``, and the rules are, with ``C = c_l c_r``::

                         "sgd"          "adam"
        rate'            C² rate        c rate
        eps'                            g eps
        weight_decay'    wd / C²        wd / c
        coupled'         wd / C²        wd / C²

    So at one scale (``C = 1``) there is nothing to convert of ``scale_by_gram``: its steps
    do not depend on how the product is cut. In general ``rate' = c rate / g^d`` with ``d``
    one or zero, ``eps' = g eps``, ``weight_decay' = wd · rate / rate'`` and
    ``coupled' = wd g / c``.

    Two of ``scale``, ``ratio``, ``left_size`` and ``right_size`` decide ``c_l`` and
    ``c_r``. Where fewer are named the scale stays, and after it the size of ``right``:
    LoRA becomes rsLoRA by ``scale`` alone. A factor that starts at zero has any size.

    Args:
        old: what is known to work.
        moments: ``"sgd"``: steps that are proportional to the gradient, with or without
            momentum. ``"adam"``: steps of each leaf alone that stay as they are if the
            gradient is multiplied by a number: the Adam family, RMSprop, Lion, signs, and
            polar factors of one factor (Muon).
        whitened: whether :func:`lrjax.scale_by_gram` comes first.
        scale: ``s'``.
        ratio: the new rate of ``left`` over that of ``right`` (LoRA+).
        left_size: the new size of the start of ``left``.
        right_size: that of ``right``.

    Returns:
        The new parameterization: its ``kind`` and its ``optimizer`` train as those of
        ``old``.

    Raises:
        ValueError: for unknown ``moments``, for more than two of the four, for a number
            that is not positive, or for a ``ratio`` that no cut of the product changes.

    Example:
        >>> import lrjax
        >>> lora = lrjax.adapters.Parameterization.of(0.1, scale=2.0)
        >>> plus = lrjax.equivalent_hyperparameters(lora, "adam", ratio=16.0)
        >>> plus.scale, plus.left.size, plus.right.size, plus.left.rate, plus.right.rate
        (2.0, 4.0, 0.25, 0.4, 0.025)

    Reference:
        Z. Zhang et al., "The primacy of magnitude in low-rank adaptation" (2025),
        arXiv:2507.06558, for the rates of SGD, and of Adam up to eps; S. Hayou, N. Ghosh,
        B. Yu, "LoRA+: efficient low rank adaptation of large models" (2024),
        arXiv:2402.12354. The other rows are derived here.
    """
    if moments not in get_args(Moments):
        raise ValueError(f"moments must be one of {get_args(Moments)}, got {moments!r}.")
    degree = 1 if moments == "sgd" else 0
    news = {
        "scale": (scale, old.scale),
        "ratio": (ratio, old.left.rate / old.right.rate),
        "left_size": (left_size, old.left.size),
        "right_size": (right_size, old.right.size),
    }
    asked = {
        name: _ratio(name, *pair) for name, pair in news.items() if pair[0] is not None
    }
    c_left, c_right = _gauge(asked, 1 - degree if whitened else 1 + degree)

    def convert(own: FactorSettings, c: Any, partner: Any) -> FactorSettings:
        gradient = 1 / (c * partner**2) if whitened else 1 / c
        rate = c / gradient**degree
        return FactorSettings(
            rate=own.rate * rate,
            size=own.size * c,
            eps=own.eps * gradient,
            weight_decay=own.weight_decay / rate,
            coupled_weight_decay=own.coupled_weight_decay * gradient / c,
        )

    left, right = convert(old.left, c_left, c_right), convert(old.right, c_right, c_left)
    return Parameterization(old.scale / (c_left * c_right), left, right, old.rest)


def _ratio(name: str, new: Any, old: Any) -> Any:
    for x in (new, old):
        if not isinstance(x, Tracer) and not np.all(np.asarray(x) > 0):
            raise ValueError(
                f"equivalent_hyperparameters needs a positive {name}, before and after: "
                f"got {new!r} in place of {old!r}."
            )
    return new / old


def _gauge(asked: dict[str, Any], power: int) -> tuple[Any, Any]:
    """``c_l`` and ``c_r`` from two products of powers of them."""
    # What is asked for is c_l^a c_r^b.
    powers = {
        "scale": (-1, -1),
        "ratio": (power, -power),
        "left_size": (1, 0),
        "right_size": (0, 1),
    }
    if "ratio" in asked and not power:
        raise ValueError(
            "The ratio of the rates is the same for every cut of the product after "
            "scale_by_gram without moments of the Adam family: leave ratio out."
        )
    for name in ("scale", "right_size"):
        if len(asked) < 2:
            asked.setdefault(name, 1.0)
    if len(asked) > 2:
        raise ValueError(
            "Two of scale, ratio, left_size and right_size decide the others, got "
            f"{len(asked)}: {', '.join(asked)}."
        )
    (x, (a, b)), (y, (c, d)) = ((value, powers[name]) for name, value in asked.items())
    det = a * d - b * c
    return x ** (d / det) * y ** (-b / det), x ** (-c / det) * y ** (a / det)
