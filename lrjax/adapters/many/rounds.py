from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
from jax.sharding import Mesh, PartitionSpec as P
from jaxtyping import PRNGKeyArray, PyTree

from ..._arguments import check_key
from ..folds import FoldRule, check_alike
from ..folds.heads import head_count, head_keys
from ..protocol import Adapters


Train = Callable[[PyTree, Adapters, Any, PRNGKeyArray], tuple[Adapters, Any]]
Round = Callable[..., tuple[PyTree, Adapters, Any]]


def federated_round(train: Train, rule: FoldRule, *, mesh: Mesh | None = None) -> Round:
    """A round of federated training: clients train apart, a rule of folds joins them.

    ``vmap`` over clients, and over a mesh a part of them on each device, which sends
    adapters and never its data. What comes of it is up to the rule:

    ===================================================== ==================================
    ``Restart(kind, heads=True)``                         stacking, exact for any ranks
                                                          (FLoRA): ``W + Σ p_h s B_h A_h``
                                                          and new factors
    ``Average()``                                         the mean of the factors, and in W
                                                          what it misses: exact (FedEx-LoRA)
    ``Average(exact=False)``                              the mean of the factors: wrong by
                                                          their cross terms (FedIT), exact
                                                          with ``LoRA(train="left")``,
                                                          made once for all (FFA-LoRA)
    ``Continue(heads=True)``                              the mean change, factors go on
    ``Restart(kind, heads=True, mean=geometric_median)``  up to half may send anything
    ===================================================== ==================================

    Clients of different ranks have masks, ``lrjax.adapters.with_ranks`` under ``vmap``.
    A server that keeps adapters of all their ranks together takes
    :func:`lrjax.adapters.combine`. A client whose weight is zero is computed all the same,
    and what it comes to is not used, be it NaN.

    **Privacy.** Gradients of single examples, clipped and with noise, are optax's
    ``differentially_private_aggregate``, within ``train``::

        tx = optax.chain(
            optax.contrib.differentially_private_aggregate(1.0, noise, key=key),
            optax.sgd(0.1))
        grads = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(params, x, y)

    Make it with the key that ``train`` is given: a state of it that clients or rounds share
    has the same noise in all of them, which their differences are free of. What (ε, δ) its
    clip, noise and number of steps come to is the business of an accountant, Google's
    ``dp-accounting`` say, and holds for its way of drawing batches. Where only ``left`` is
    trained, the change is linear in the noise.

    Args:
        train: ``(model, adapters, data, key) -> (adapters, report)`` of one client, such as
            some steps of an optimizer that begins anew; ``adapters`` come back with the
            arrays that they had.
        rule: of folds, for heads. Its ``axis_name`` is the axis of ``mesh``.
        mesh: whose devices have a part of the clients each.

    Returns:
        ``round(model, clients, data, *, key, weights=None) -> (model, clients, reports)``,
        to be jitted: with the base that all have, their adapters and their data along a
        leading axis, and weights of the clients such as their numbers of examples, zero for
        those that are not in the round. It gives the new base, the adapters that clients go
        on with, and what ``train`` reported.

    Raises:
        TypeError: for a rule that is none.
        ValueError: for a rule that is not of heads, or a mesh without the axis of the rule;
            when called, for clients that the mesh does not divide, by path if ``train``
            gives other arrays back, and as the rule.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax, optax
        >>> model = eqx.nn.Linear(8, 8, key=jax.random.key(0))
        >>> kind, tx = lrjax.LoRA(rank=4), optax.sgd(0.02)
        >>> def train(model, adapters, data, key):
        ...     def loss(params):
        ...         bound = lrjax.bind(model, eqx.combine(params, frozen))
        ...         return jnp.mean((jax.vmap(bound)(data) - data) ** 2)
        ...     params, frozen = lrjax.partition(adapters)
        ...     value, grads = jax.value_and_grad(loss)(params)
        ...     params = optax.apply_updates(params, tx.update(grads, tx.init(params))[0])
        ...     return eqx.combine(params, frozen), value
        >>> def client(key, rank):
        ...     adapters = lrjax.adapt(model, kind, key=key)
        ...     return lrjax.adapters.with_ranks(adapters, rank)
        >>> keys = jax.random.split(jax.random.key(1), 4)
        >>> clients = jax.vmap(client)(keys, jnp.array([4, 2, 1, 1]))
        >>> data = jax.random.normal(jax.random.key(2), (4, 16, 8))
        >>> rule = lrjax.adapters.Restart(kind, heads=True)
        >>> play = jax.jit(lrjax.adapters.federated_round(train, rule))
        >>> model, clients, losses = play(model, clients, data, key=jax.random.key(3))
        >>> losses.shape
        (4,)

    Reference:
        Z. Wang et al., "FLoRA: federated fine-tuning large language models with
        heterogeneous low-rank adaptations" (2024), arXiv:2409.05976; X.-Y. Liu et al.,
        "Differentially private low-rank adaptation of large language model using federated
        learning" (2023), arXiv:2312.17493. Of one client it is its training, merged.
    """
    if not isinstance(rule, FoldRule):
        raise TypeError(
            "federated_round takes a rule such as lrjax.adapters.Restart(kind, "
            f"heads=True), got {rule!r}."
        )
    if not getattr(rule, "heads", True):
        raise ValueError(
            f"federated_round joins clients, and {type(rule).__name__} folds one adapter: "
            "say heads=True."
        )
    axis = getattr(rule, "axis_name", None)
    if mesh is not None and axis not in mesh.axis_names:
        raise ValueError(
            f"The rule sums over axis_name={axis!r}, and the mesh has "
            f"{mesh.axis_names}: name the axis that clients lie along in the rule."
        )

    def play(model, clients, data, *, key, weights=None):
        check_key("federated_round", key)
        arrays, static = eqx.partition(model, eqx.is_array)

        def local(arrays, clients, data, weights, key):
            model = eqx.combine(arrays, static)
            k_train, k_rule = jr.split(key)
            keys = head_keys(k_train, head_count(clients), axis)
            one = lambda own, data, key: train(model, own, data, key)
            trained, reports = jax.vmap(one)(clients, data, keys)
            check_alike(clients, trained)
            model, clients, _ = rule(model, trained, (), key=k_rule, weights=weights)
            return eqx.filter(model, eqx.is_array), clients, reports

        if mesh is not None:
            assert axis is not None
            _check_divides(head_count(clients), mesh.shape[axis], axis)
            own = P(axis)
            local = jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(P(), own, own, own, P()),
                out_specs=(P(), own, own),
                axis_names={axis},
            )
        arrays, clients, reports = local(arrays, clients, data, weights, key)
        return eqx.combine(arrays, static), clients, reports

    return play


def _check_divides(clients: int, devices: int, axis: str) -> None:
    if clients % devices:
        raise ValueError(
            f"There are {clients} clients for the {devices} devices along {axis!r}: take a "
            "number that these divide; some may have the weight zero."
        )
