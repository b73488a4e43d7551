from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from ..._arguments import check_key
from ..._batching import any_member
from ..._sharding import select
from ..._sites import flat_leaves
from ..protocol import Adapters
from ._parts import check_alike
from .rules import FoldRule


Fold = Callable[
    [Int[Array, ""] | int, PyTree, Adapters, PyTree], tuple[PyTree, Adapters, PyTree]
]


def fold(k: int | Array, rule: FoldRule, *, key: PRNGKeyArray) -> Fold:
    """Fold adapters into the weights in every k-th step, in one compiled program.

    After the updates ``k, 2k, …`` model, adapters and optimizer state are what ``rule``
    makes of them: the same function, with room for another update of low rank. The other
    steps do not pay for it, under ``vmap`` either, where each member may have a period of
    its own. It comes behind the gradient: there is no derivative through it in reverse.

    Args:
        k: the period; may be traced.
        rule: :class:`lrjax.adapters.Restart` or :class:`lrjax.adapters.Continue`, which
            may also be called by themselves, whenever one likes.
        key: folded with the number of the step.

    Returns:
        ``(step, model, adapters, state) -> (model, adapters, state)`` with the number of
        updates so far, from one; for the end of a training step. Donate what it replaces,
        ``jax.jit(…, donate_argnums=…)``, so that weights are not copied.

    Raises:
        ValueError: if ``k`` is below one; when called, by path, if the adapters would come
            back with other arrays than they had.
        TypeError: if ``rule`` is no rule or ``key`` no key.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax, optax
        >>> model = eqx.nn.Linear(8, 8, key=jax.random.key(0))
        >>> kind, tx = lrjax.LoRA(rank=1), optax.sgd(0.1)
        >>> adapters = lrjax.adapt(model, kind, key=jax.random.key(1))
        >>> state, start = tx.init(lrjax.partition(adapters)[0]), model.weight
        >>> rule = lrjax.adapters.Restart(kind)
        >>> folds = lrjax.fold(10, rule, key=jax.random.key(2))
        >>> @jax.jit
        ... def train_step(step, model, adapters, state):
        ...     params, frozen = lrjax.partition(adapters)
        ...     def loss(params):
        ...         bound = lrjax.bind(model, eqx.combine(params, frozen))
        ...         return jnp.sum((bound.merged().weight - jnp.eye(8)) ** 2) / 2
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     return folds(step, model, eqx.combine(params, frozen), state)
        >>> for step in range(1, 31):
        ...     model, adapters, state = train_step(step, model, adapters, state)
        >>> jnp.linalg.matrix_rank(model.weight - start, rtol=1e-4).item()
        3

    Reference:
        V. Lialin et al., "ReLoRA: high-rank training through low-rank updates" (2023),
        arXiv:2307.05695; M. Huh et al., "Training neural networks from scratch with
        parallel low-rank adapters" (2024), arXiv:2402.16828.
    """
    if not isinstance(k, Tracer) and np.any(np.asarray(k) < 1):
        raise ValueError(f"fold needs a period of at least one step, got {k}.")
    if not isinstance(rule, FoldRule):
        raise TypeError(
            "fold takes a rule such as lrjax.adapters.Restart(lrjax.LoRA(rank=8)), got "
            f"{rule!r}."
        )
    check_key("fold", key)

    def folded(step, model, adapters, state):
        due = (jnp.asarray(step) > 0) & (jnp.asarray(step) % k == 0)
        leaves, treedef = flat_leaves(model)
        layers = {path: leaf for path, leaf in leaves if path in adapters.layers}
        arrays, static = eqx.partition(layers, eqx.is_array_like)
        before = jax.tree.map(jnp.asarray, (arrays, adapters, state))

        def run(carry):
            _, arrays, adapters, state = carry
            own = eqx.combine(arrays, static)
            whole = treedef.unflatten(own.get(path, leaf) for path, leaf in leaves)
            merged, new, carried = rule(whole, adapters, state, key=jr.fold_in(key, step))
            check_alike(adapters, new)
            found = dict(flat_leaves(merged)[0])
            changed = eqx.filter({path: found[path] for path in layers}, eqx.is_array_like)
            after = select(due, (changed, new, carried), carry[1:])
            return jnp.zeros((), bool), *after

        # A loop of one turn or none works in place. A conditional that hands on what it
        # was given is a copy of all weights, in every step, where it runs on a GPU.
        _, arrays, adapters, state = lax.while_loop(
            lambda carry: carry[0], run, (any_member(due), *before)
        )
        layers = eqx.combine(arrays, static)
        model = treedef.unflatten(layers.get(path, leaf) for path, leaf in leaves)
        return model, adapters, state

    return folded
