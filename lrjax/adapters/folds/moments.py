import abc
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, PRNGKeyArray, PyTree

from ..._moments import check_moments_known, read_moments, write_moments
from ..._sharding import gathered, select
from ..protocol import Adapters, map_adapters, partition
from ._frames import frames_of
from ._parts import begun_anew, check_alike


class MomentRule(eqx.Module):
    """What becomes of the state of the optimizer when adapters begin anew."""

    @abc.abstractmethod
    def __call__(
        self, state: PyTree, old: Adapters, new: Adapters, *, key: PRNGKeyArray
    ) -> PyTree:
        """The state to go on with.

        Args:
            state: of the optimizer, for the trained half of :func:`lrjax.partition`.
            old: the adapters that were folded.
            new: those that begin.
            key: for random numbers.
        """


class KeepMoments(MomentRule):
    """Leave the state as it is, moments of adapters that are gone and all.

    Example:
        >>> import lrjax
        >>> rule = lrjax.adapters.Restart(
        ...     lrjax.LoRA(4), lrjax.adapters.KeepMoments())
    """

    def __call__(self, state, old, new, *, key):
        """The same."""
        return state


class ResetMoments(MomentRule):
    """Begin with a new state, in which only the schedules of rates go on.

    Moments and the counts that correct their bias are as ``tx.init`` makes them, so that
    the first steps have the size that they had in the beginning. The counts of schedules
    and rates that ``optax.inject_hyperparams`` holds stay. Adapters may come back with
    other ranks.

    Args:
        tx: the optimizer.

    Example:
        >>> import lrjax, optax
        >>> rule = lrjax.adapters.ResetMoments(optax.adam(1e-3))

    Reference:
        W. Xia, C. Qin, E. Hazan, "Chain of LoRA: efficient fine-tuning of language models
        via residual learning" (2024), arXiv:2401.04151.
    """

    tx: optax.GradientTransformation = eqx.field(static=True)

    def __call__(self, state, old, new, *, key):
        """That of ``tx.init``, with the rates of the old one."""
        params: Any = partition(new)[0]
        return _with_rates_of(state, self.tx.init(params))


class PruneMoments(MomentRule):
    """Forget a part of the numbers that the optimizer holds for what begins anew.

    Of each parameter a share ``fraction`` of the entries goes back to what ``tx.init``
    gives, zero for moments; the same entries in all that the state holds of the
    parameter's shape, so that no first moment is left over without its second. By
    magnitude it is those that are smallest in the first of these, the first moment of
    Adam. Counts run on: steps of forgotten entries are too large for a while,
    ``(1 − b₁)/√(1 − b₂)`` times, 3.2 with Adam's defaults, which is what
    :func:`lrjax.adapters.rewarm` is for.

    The state is found by parameter, ``optax.tree_utils.tree_map_params``: of any
    optimizer, in chains, masked or with one for each label.

    Args:
        tx: the optimizer.
        fraction: how much is forgotten, from 0 to 1.
        by: ``"random"`` entries, or those of small ``"magnitude"``.

    Raises:
        ValueError: for a fraction outside [0, 1] or an unknown ``by``; when it folds, by
            path, if an adapter came back with another structure; if all that the state
            holds of a parameter has other shapes; by magnitude, for integers.

    Example:
        >>> import lrjax, optax
        >>> rule = lrjax.adapters.PruneMoments(optax.adam(1e-3), 0.999)

    Reference:
        V. Lialin et al., "ReLoRA: high-rank training through low-rank updates" (2023),
        arXiv:2307.05695, which prunes both moments each by itself. With ``fraction=0`` it
        is :class:`lrjax.adapters.KeepMoments`.
    """

    tx: optax.GradientTransformation = eqx.field(static=True)
    fraction: ArrayLike
    by: Literal["random", "magnitude"] = eqx.field(static=True)

    def __init__(
        self,
        tx: optax.GradientTransformation,
        fraction: ArrayLike = 0.999,
        by: Literal["random", "magnitude"] = "random",
    ):
        if not isinstance(fraction, Tracer) and not np.all(
            (np.asarray(fraction) >= 0) & (np.asarray(fraction) <= 1)
        ):
            raise ValueError(
                f"PruneMoments forgets a fraction from 0 to 1 of the entries, got "
                f"{fraction}."
            )
        if by not in ("random", "magnitude"):
            raise ValueError(
                f'PruneMoments prunes by="random" or by="magnitude", got {by!r}.'
            )
        self.tx, self.fraction, self.by = tx, fraction, by

    def __call__(self, state, old, new, *, key):
        """The same entries of each parameter, in all of the state."""
        check_alike(old, new)
        params: Any = partition(new)[0]
        marks = partition(_marks(new))[0]
        leaves, treedef = jax.tree.flatten(params)
        keys = jr.split(key, len(leaves))
        parts = [_Parameter() for _ in leaves]
        of = treedef.unflatten(parts)
        fresh = self.tx.init(params)
        _over_params(self.tx, lambda x, part: part.held.append(x), state, of)
        _over_params(self.tx, lambda x, part: part.fresh.append(x), fresh, of)
        rows = zip(parts, leaves, jax.tree.leaves(marks), keys, strict=True)
        for part, leaf, anew, own in rows:
            if anew:
                part.prune(leaf.shape, lambda first, own=own: self._kept(first, own))
        return _over_params(self.tx, lambda _, part: part.held.pop(0), state, of)

    def _kept(self, first: Array, key: PRNGKeyArray) -> Bool[Array, "..."]:
        if self.by == "random":
            return jr.uniform(key, first.shape) >= self.fraction
        if not jnp.issubdtype(first.dtype, jnp.inexact):
            raise ValueError(
                f"PruneMoments by magnitude found moments stored as {first.dtype}, whose "
                'size cannot be read: prune by="random", or reset them.'
            )
        sizes = gathered(jnp.abs(first)).ravel()
        places = (
            jnp.zeros(sizes.shape, int).at[jnp.argsort(sizes)].set(jnp.arange(sizes.size))
        )
        return (places >= self.fraction * sizes.size).reshape(first.shape)


class RotateMoments(MomentRule):
    """Carry the moments of factors over into the frame of the new ones.

    The gradient of B is ``G P`` with the frame ``P = s Aᵀ (in, r)``, that of Aᵀ is
    ``Gᵀ P`` with ``P = s B (out, r)``. What the old frame saw of G is seen in the new one
    through ``C = P_newᵀ P_old (P_oldᵀ P_old)⁻¹ (r, r)``::

        m ← m Cᵀ
        v ← v (C ⊙ C)ᵀ + v̄ eᵀ

    exact for the first moment if the new frame lies in the span of the old. Of the
    squares it assumes that coordinates are uncorrelated; directions outside of the old
    span, of squared length ``e_i = ‖p_i‖² − ‖P_old-part of p_i‖²``, get the mean of
    ``v_j / ‖p_j‖²`` that was seen in each row, ``v̄``. Where a new factor is zero, as B of
    LoRA is, the gradient of the other one is zero, and so are its moments. The formula for
    v is derived here.

    It moves the moments that are known (:func:`lrjax.subspaces.register_moments`) of
    factors without gates; copies, biases and lengths beside them keep theirs.

    Raises:
        ValueError: when it folds, by path, for adapters that are no two factors, or which
            came back with another structure; for states with moments in unknown fields.

    Example:
        >>> import lrjax
        >>> rule = lrjax.adapters.Restart(
        ...     lrjax.LoRA(4, init="pissa"), lrjax.adapters.RotateMoments())
    """

    def __call__(self, state, old, new, *, key):
        """Both moments of each factor, in its new frame."""
        check_alike(old, new)
        check_moments_known(state)
        treedef = jax.tree.structure(partition(new)[0])
        frames = jax.tree.leaves(partition(frames_of(old, new))[0])
        moments = read_moments(state, treedef)
        moved = [
            [frame.moved(own) for own in each]
            for frame, each in zip(frames, moments, strict=True)
        ]
        return write_moments(state, treedef, moved)


def _marks(adapters: Adapters) -> Adapters:
    """Which numbers begin anew; those of pools do."""
    pools = jax.tree.map(lambda _: True, adapters.pools)
    marked = map_adapters(lambda _, own: begun_anew(own), adapters)
    return Adapters(marked.layers, pools, adapters.axes)


class _Parameter:
    """What a state holds of one parameter, and what a new state would."""

    def __init__(self):
        self.held: list[Any] = []
        self.fresh: list[Any] = []

    def prune(self, shape: tuple[int, ...], kept: Callable[[Array], Array]) -> None:
        """Entries that are not kept become those of the new state."""
        alike = [jnp.shape(x) == shape for x in self.held]
        if not self.held:
            return
        if True not in alike:
            raise ValueError(
                f"PruneMoments found {[jnp.shape(x) for x in self.held]} in the state for "
                f"a parameter {shape}, and nothing of its shape to forget entries of: use "
                "ResetMoments."
            )
        mask = kept(self.held[alike.index(True)])
        self.held = [
            select(mask, x, new) if same else x
            for x, new, same in zip(self.held, self.fresh, alike, strict=True)
        ]


def _over_params(tx: Any, f: Callable, state: PyTree, of: PyTree) -> PyTree:
    """``f`` of all that a state holds of parameters, in the order of the state."""
    is_masked = lambda x: isinstance(x, optax.MaskedNode)

    def own(x: Any, part: Any) -> Any:
        return x if is_masked(x) else f(x, part)

    return optax.tree_utils.tree_map_params(tx, own, state, of, is_leaf=is_masked)


# States that say how large steps are at which time, and go on through a fold.
_RATES = (optax.ScaleByScheduleState, optax.contrib.ReduceLROnPlateauState)


def _with_rates_of(old: Any, new: Any) -> Any:
    """The new state, but for schedules and injected rates, which are the old ones."""
    if isinstance(new, _RATES):
        return old
    if hasattr(new, "hyperparams"):
        return old._replace(inner_state=_with_rates_of(old.inner_state, new.inner_state))
    if isinstance(new, dict):
        return type(new)({name: _with_rates_of(old[name], new[name]) for name in new})
    if isinstance(new, tuple | list):
        each = [_with_rates_of(o, n) for o, n in zip(old, new, strict=True)]
        return type(new)(*each) if hasattr(new, "_fields") else type(new)(each)
    return new
