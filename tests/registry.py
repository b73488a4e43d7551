"""Every public part, with what the contract tests must know about it.

A transform or recipe that is exported and not entered here makes
``tests/contract/test_registered.py`` fail. The plug-ins of the subspace loop and the
operators of recovery are found by their classes; only those that take more than a rank,
or nothing, are described.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import ArrayLike

import lrjax
from lrjax import subspaces as sub
from tests.helpers import random_low_rank


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """One configuration of a public part, equal to itself alone.

    Attributes:
        factory: the public function.
        arguments: how it is called here.
        numbers: names of arguments that may be tracers, with a second value each.
        params: ``"pairs"``: a tree with LowRank nodes; ``"svd"``: one with SVDForm nodes;
            ``"tucker"``: one with tensors in Tucker form; ``"dense"``: a tree of matrices;
            ``"stack"``: one stack of matrices.
        extra: whether ``update`` needs ``value`` and ``grad``.
        descends: whether it is an optimizer that lowers a loss by itself.
        gauge: under which change of factors, (L Q, R Q⁻ᵀ), the step of the product is
            the same: any invertible Q, orthogonal Q, or none.
        transposes: whether swapping the factors of the input swaps those of the output.
        stacks: whether a stack of matrices is a loop over its layers.
        static: arguments that ``inject_hyperparams`` must not touch.
        composed_of: the registered parts that it is put together from, if it has no
            kernel of its own: their numbers are checked, and here only the wiring.
        shards: whether tall factors stay sharded through an update.
        couples: whether the update of a leaf depends on the other leaves.
        drop_in: the arguments with which it reaches the targets of optax's own contract
            test in its 30,000 steps.
    """

    factory: Callable[..., Any]
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)
    params: Literal["pairs", "svd", "tucker", "dense", "stack"] = "pairs"
    extra: bool = False
    descends: bool = False
    gauge: Literal["any", "orthogonal", "none"] = "none"
    transposes: bool = True
    stacks: bool = True
    static: tuple[str, ...] = ()
    composed_of: tuple[str, ...] = ()
    shards: bool = True
    couples: bool = False
    drop_in: dict[str, Any] | None = None

    def make(self, **changes) -> optax.GradientTransformationExtraArgs:
        """The transform, with some of its arguments changed."""
        return optax.with_extra_args_support(self.factory(**{**self.arguments, **changes}))


def pair_params(key, dtype=jnp.float32):
    """One pair, a stack of three pairs, a vector, and a leaf that is ``None``."""
    kp, ks, kb = jr.split(key, 3)
    return {
        "pair": random_low_rank(kp, 8, 5, 2, dtype=dtype),
        "stack": random_low_rank(ks, 6, 4, 2, batch=(3,), dtype=dtype),
        "bias": jr.normal(kb, (5,), dtype),
        "none": None,
    }


def svd_params(key, dtype=jnp.float32):
    """The same tree with its pairs as SVDForm nodes."""
    pairs = pair_params(key, dtype)
    nodes = {name: lrjax.svd(pairs[name]) for name in ("pair", "stack")}
    return {**pairs, **nodes}


def tucker_params(key, dtype=jnp.float32):
    """A tensor in Tucker form, a stack of three, a vector, and a leaf that is ``None``."""
    kp, ks, kb = jr.split(key, 3)
    form = lambda x: lrjax.lowrank.higher_order_svd(x, (2, 2, 2))
    return {
        "tensor": form(jr.normal(kp, (5, 4, 3), dtype)),
        "stack": jax.vmap(form)(jr.normal(ks, (3, 4, 3, 2), dtype)),
        "bias": jr.normal(kb, (5,), dtype),
        "none": None,
    }


def dense_params(key, dtype=jnp.float32):
    """A tall and a wide matrix, a stack of three, a vector, and a leaf that is ``None``."""
    kt, kw, ks, kb = jr.split(key, 4)
    return {
        "tall": jr.normal(kt, (12, 8), dtype),
        "wide": jr.normal(kw, (8, 12), dtype),
        "stack": jr.normal(ks, (3, 8, 6), dtype),
        "bias": jr.normal(kb, (5,), dtype),
        "none": None,
    }


def stack_params(key, dtype=jnp.float32):
    """A stack of three matrices, a vector, and a leaf that is ``None``.

    For optimizers whose program grows with the number of projected leaves.
    """
    params = dense_params(key, dtype)
    return {name: params[name] for name in ("stack", "bias", "none")}


PARAMS = {
    name: jax.jit(make, static_argnums=1)
    for name, make in {
        "pairs": pair_params,
        "svd": svd_params,
        "tucker": tucker_params,
        "dense": dense_params,
        "stack": stack_params,
    }.items()
}


def loss(params):
    """A smooth loss of all numbers of a tree; zero-curvature directions included."""
    nodes = lrjax.LowRank | lrjax.SVDForm | lrjax.lowrank.TuckerForm
    is_node = lambda x: isinstance(x, nodes)
    dense = jax.tree.map(
        lambda x: x.materialize() if is_node(x) else x, params, is_leaf=is_node
    )
    leaves = jax.tree.leaves(dense)
    return sum(jnp.mean((x.astype(jnp.float32) - 0.5) ** 2) for x in leaves)


# Compiled by itself, so that all programs that it is part of share one trace of it.
value_and_grad = jax.jit(jax.value_and_grad(loss))


def pair_rule(path):
    """The rule for on_pairs on a tree of LowRank nodes, whose leaves have their names."""
    return lrjax.pairs_by_name("left", "right", transpose_right=False)(path)


def _project_out(side):
    sizes = {"tall": (12, 2), "wide": (8, 2), "stack": (3, 8, 2)}
    basis = {name: jnp.linalg.qr(jnp.ones(shape))[0] for name, shape in sizes.items()}
    return lrjax.project_out({**basis, "bias": None, "none": None}, side=side)


def _project_conflicts(margin, damping):
    """With the gradients of two losses of the same parameters, the first one opposed."""
    tx = lrjax.project_conflicts(margin, damping=damping)
    memories = lambda x: jnp.stack([0.5 - x, 3 * (x - 0.2) ** 2])

    def update(updates, state, params=None, **extra):
        return tx.update(
            updates, state, params, memory=jax.tree.map(memories, params), **extra
        )

    return tx._replace(update=update)


def _scale_by_width(optimizer):
    base = {"tall": (6, 4), "wide": (4, 6), "stack": (3, 4, 3), "bias": (5,)}
    struct = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    return lrjax.scale_by_width({n: struct(s) for n, s in base.items()}, optimizer)


def _on_pairs(damping):
    return lrjax.on_pairs(lrjax.scale_by_gram(damping), pair_rule)


def _gram_with_momentum(damping, decay, order):
    return lrjax.scale_by_gram(damping, order=order, phi=optax.ema(decay))


def _gram_with_moments(damping, b1, b2, eps):
    return lrjax.scale_by_gram(damping, phi=lrjax.scale_by_matrix_adam(b1, b2, eps))


def _with_loss(factory):
    """A transform that asks for the loss as a function, told that of the registry."""

    @functools.wraps(factory)
    def make(*args, **kwargs):
        tx = factory(*args, **kwargs)
        update = functools.partial(tx.update, value_fn=loss)
        return tx._replace(update=update)

    return make


def _prune_entries(fraction):
    return lrjax.prune_entries(optax.sgd(0.1), fraction)


def _sample_directions(learning, warmup, key=None):
    return lrjax.sample_directions(
        learning, 1, period=2, refactor_every=4, warmup=warmup, key=key
    )


def _perturb_along_momentum(radius, smoothing, most, scale):
    adam = optax.scale_by_adam()
    return lrjax.perturb_along_momentum(
        adam, radius, smoothing=smoothing, most=most, scale=scale
    )


def _alternate_factors(b1, carry_moments):
    moments = optax.chain(lrjax.scale_by_gram(), optax.ema(b1))
    return lrjax.alternate_factors(moments, carry_moments=carry_moments)


def _freeze_factors(fraction, b1):
    return lrjax.freeze_factors(optax.sgd(0.1), fraction, window=2, b1=b1)


TRANSFORMS: dict[str, Entry] = {
    "scale_by_gram": Entry(
        lrjax.scale_by_gram, {"damping": 0.0}, {"damping": 0.3}, gauge="any"
    ),
    "scale_by_gram(absolute)": Entry(
        lrjax.scale_by_gram,
        {"damping": 0.1, "relative": False},
        {"damping": 0.3},
        gauge="orthogonal",
    ),
    "scale_by_gram(alternating)": Entry(
        lrjax.scale_by_gram,
        {"damping": 1e-3, "order": "alternating"},
        {"damping": 0.3},
        gauge="orthogonal",
        transposes=False,
    ),
    "scale_by_gram(phi)": Entry(
        lrjax.scale_by_gram,
        {"damping": 1e-3, "phi": lrjax.unit_norm},
        {"damping": 0.3},
        gauge="orthogonal",
        static=("phi",),
    ),
    "scale_by_gram(greedy)": Entry(
        lrjax.scale_by_gram,
        {"damping": 1e-3, "order": "greedy"},
        {"damping": 0.3},
        gauge="orthogonal",
    ),
    "scale_by_gram(momentum)": Entry(
        _gram_with_momentum,
        {"damping": 1e-3, "decay": 0.9, "order": "alternating"},
        {"damping": 0.3, "decay": 0.5},
        gauge="orthogonal",
        transposes=False,
        static=("order",),
    ),
    "scale_by_gram(moments)": Entry(
        _gram_with_moments,
        {"damping": 0.0, "b1": 0.9, "b2": 0.99, "eps": 1e-8},
        {"damping": 0.3, "b1": 0.5, "b2": 0.9, "eps": 1e-3},
        gauge="any",
    ),
    "scale_by_matrix_adam": Entry(
        lrjax.scale_by_matrix_adam,
        {"b1": 0.9, "b2": 0.99, "eps": 1e-8},
        {"b1": 0.5, "b2": 0.9, "eps": 1e-3},
        gauge="orthogonal",
    ),
    "scale_by_gram(loss_power)": Entry(
        lrjax.scale_by_gram,
        {"damping": 0.1, "loss_power": 1.0, "f_min": 0.0},
        {"damping": 0.3, "loss_power": 0.5, "f_min": 0.1},
        extra=True,
        gauge="orthogonal",
    ),
    "scale_by_polyak": Entry(
        lrjax.scale_by_polyak, {"f_min": 0.0}, {"f_min": 0.1}, extra=True, stacks=False
    ),
    "scale_by_polyak(cap)": Entry(
        lrjax.scale_by_polyak,
        {"f_min": 0.0, "cap": 0.05},
        {"cap": 0.5},
        extra=True,
        stacks=False,
    ),
    "scale_by_target_level": Entry(
        lrjax.scale_by_target_level,
        {"fraction": 0.1, "patience": 3.0, "shrink": 0.5, "grow": 1.2},
        {"fraction": 0.3, "patience": 1.0, "shrink": 0.7, "grow": 1.0},
        extra=True,
        stacks=False,
    ),
    "scale_by_gauss_newton": Entry(
        lrjax.scale_by_gauss_newton,
        {"damping": 0.1, "normalize": True},
        {"damping": 0.3},
        gauge="orthogonal",
    ),
    "add_anchor": Entry(lrjax.add_anchor, {"weight": 0.1}, {"weight": 0.3}, params="dense"),
    "add_anchor(product)": Entry(
        lrjax.add_anchor,
        {"weight": 0.1, "of": "product"},
        {"weight": 0.3},
        gauge="orthogonal",
    ),
    "add_nuclear_norm": Entry(
        lrjax.add_nuclear_norm, {"weight": 0.1}, {"weight": 0.3}, gauge="orthogonal"
    ),
    "add_nuclear_norm(dense)": Entry(
        lrjax.add_nuclear_norm,
        {"weight": 0.1, "energy": 0.9, "where": lambda path, shape: len(shape) >= 2},
        {"weight": 0.3, "energy": 1.0},
        params="dense",
    ),
    "add_frobenius_decay": Entry(
        lrjax.add_frobenius_decay,
        {"weight_decay": 0.1},
        {"weight_decay": 0.3},
        gauge="orthogonal",
    ),
    "add_imbalance_penalty": Entry(
        lrjax.add_imbalance_penalty,
        {"strength": 0.1},
        {"strength": 0.3},
        gauge="orthogonal",
        transposes=False,
    ),
    "add_imbalance_penalty(ratio)": Entry(
        lrjax.add_imbalance_penalty,
        {"strength": 0.1, "ratio": 1.0},
        {"ratio": 0.5},
        gauge="orthogonal",
    ),
    "scale_by_row_norms": Entry(
        lrjax.scale_by_row_norms, {"most": 2.0}, {"most": 0.5}, transposes=False
    ),
    "perturb_along_momentum": Entry(
        _perturb_along_momentum,
        {"radius": 0.1, "smoothing": 0.9, "most": 10.0, "scale": 1.0},
        {"radius": 0.3, "smoothing": 0.5, "most": 1.0, "scale": 2.0},
    ),
    "scale_factors": Entry(
        lrjax.scale_factors,
        {"left": 16.0, "right": 1.0},
        {"left": 2.0, "right": 3.0},
        gauge="orthogonal",
        transposes=False,
    ),
    "add_hierarchical_lasso": Entry(
        lrjax.add_hierarchical_lasso,
        {"strength": 0.1, "eps": 1e-8},
        {"strength": 0.3, "eps": 0.1},
    ),
    "prune_columns": Entry(
        lrjax.prune_columns, {"threshold": 3.0, "period": 2}, {"threshold": 9.0}
    ),
    "pull_to_low_rank": Entry(
        lrjax.pull_to_low_rank,
        {
            "rank_weight": 1e-3,
            "penalty": 0.1,
            "penalty_growth": 1.5,
            "period": 2,
            "where": lambda path, shape: len(shape) >= 2,
        },
        {"rank_weight": 1e-2, "penalty": 0.3, "penalty_growth": 1.1},
        params="dense",
    ),
    "prune_entries": Entry(_prune_entries, {"fraction": 0.5}, {"fraction": 0.2}),
    "freeze_factors": Entry(
        _freeze_factors,
        {"fraction": 0.5, "b1": 0.85},
        {"fraction": 0.2, "b1": 0.5},
        stacks=False,
        couples=True,
    ),
    "dynamical_low_rank": Entry(
        lrjax.dynamical_low_rank,
        {"inner": optax.adam(0.1), "tol": 0.1},
        {"tol": 0.4},
        params="svd",
        static=("inner",),
    ),
    "dynamical_low_rank(augmented)": Entry(
        lrjax.dynamical_low_rank,
        {"inner": optax.sgd(0.1, 0.9), "tol": 0.1, "method": "augmented", "every": 2},
        {"tol": 0.4},
        params="svd",
        static=("inner",),
    ),
    "dynamical_low_rank(tensors)": Entry(
        lrjax.dynamical_low_rank,
        {"inner": optax.adam(0.1), "tol": 0.1},
        {"tol": 0.4},
        params="tucker",
        static=("inner",),
    ),
    "riemannian": Entry(
        lrjax.riemannian,
        {"inner": optax.sgd(0.1, 0.9)},
        params="svd",
        static=("inner",),
    ),
    "add_condition_penalty": Entry(
        lrjax.add_condition_penalty, {"strength": 0.1}, {"strength": 0.3}, params="svd"
    ),
    "sample_directions": Entry(
        _sample_directions,
        {"learning": 0.1, "warmup": 1.0},
        {"learning": 0.02, "warmup": 3.0},
        params="svd",
    ),
    "shrink": Entry(lrjax.shrink, {"threshold": 0.1}, {"threshold": 0.3}, params="dense"),
    "shrink_singular_values": Entry(
        lrjax.shrink_singular_values,
        {"threshold": 0.1, "where": lambda path, shape: len(shape) >= 2},
        {"threshold": 0.3},
        params="dense",
    ),
    "keep_rank": Entry(
        lrjax.keep_rank,
        {"rank": 2, "where": lambda path, shape: len(shape) >= 2},
        params="dense",
        static=("rank",),
    ),
    "scale_by_tangent": Entry(
        lrjax.scale_by_tangent, {"damping": 0.0}, {"damping": 0.3}, gauge="any"
    ),
    "scale_by_smooth_polar": Entry(
        lrjax.scale_by_smooth_polar,
        {"beta": 0.1},
        {"beta": 0.3},
        params="dense",
    ),
    "retract": Entry(lrjax.retract, gauge="orthogonal"),
    "keep_orthonormal": Entry(lrjax.keep_orthonormal, gauge="orthogonal"),
    "landing_field": Entry(
        lrjax.landing_field, {"pull": 0.5}, {"pull": 2.0}, gauge="orthogonal"
    ),
    "rebalance": Entry(lrjax.rebalance, gauge="orthogonal"),
    "rebalance(nearest)": Entry(lrjax.rebalance, {"mode": "nearest"}, gauge="orthogonal"),
    "on_pairs": Entry(_on_pairs, {"damping": 0.1}, {"damping": 0.3}, gauge="orthogonal"),
    "compress_momentum": Entry(
        lrjax.compress_momentum,
        {"rank": 2, "where": lambda path, shape: len(shape) >= 2, "momentum": 0.9},
        {"momentum": 0.5},
        params="stack",
        static=("rank", "where", "normalize", "reduce"),
    ),
    "factored_momentum": Entry(
        lrjax.factored_momentum,
        {"rank": 2, "where": lambda path, shape: len(shape) >= 2, "momentum": 0.9},
        {"momentum": 0.5},
        params="stack",
        static=("rank", "where"),
    ),
    "scale_by_psgd": Entry(
        lrjax.scale_by_psgd,
        {"rank": 2, "rate": 0.1},
        {"rate": 0.2},
        params="stack",
        stacks=False,
        static=("rank",),
        couples=True,
    ),
    "scale_by_gradient_window": Entry(
        lrjax.scale_by_gradient_window,
        {"window": 3, "damping": 0.1},
        {"damping": 0.5},
        params="stack",
        stacks=False,
        static=("window", "dtype"),
        couples=True,
    ),
    "scale_by_nystrom": Entry(
        _with_loss(lrjax.scale_by_nystrom),
        {"rank": 2, "damping": 0.01, "refresh_every": 2, "rate_steps": 2},
        {"damping": 0.05},
        params="stack",
        stacks=False,
        static=("rank", "rate_steps", "product"),
        couples=True,
    ),
    "scale_by_kl_shampoo": Entry(
        lrjax.scale_by_kl_shampoo,
        {
            "b2": 0.95,
            "eps": 1e-3,
            "numerator": optax.ema(0.9),
            "refresh_every": 2,
            "where": lambda path, shape: len(shape) >= 2,
        },
        {"b2": 0.5, "eps": 1e-2},
        params="stack",
        static=("numerator", "refresh_every", "max_side", "where"),
    ),
    "scale_by_psgd_kron": Entry(
        lrjax.scale_by_psgd_kron,
        {"rate": 0.1, "damping": 1e-9, "where": lambda path, shape: len(shape) >= 2},
        {"rate": 0.2, "damping": 1e-3},
        params="stack",
        static=("max_side",),
    ),
    "scale_by_psgd_kron(diagonal)": Entry(
        lrjax.scale_by_psgd_kron,
        {"rate": 0.1, "max_side": 6, "where": lambda path, shape: len(shape) >= 2},
        {"rate": 0.2},
        params="stack",
        static=("max_side",),
    ),
    "rotate_updates": Entry(
        lrjax.rotate_updates,
        {
            "inner": optax.scale_by_adam(),
            "decay": 0.95,
            "refresh_every": 2,
            # The long side of one gradient has a null space, in which Adam divides
            # rounding errors by rounding errors.
            "side": "short",
            "where": lambda path, shape: len(shape) >= 2,
        },
        {"decay": 0.5},
        params="stack",
        static=("inner", "refresh_every", "max_side", "where"),
    ),
    "follow_geodesics": Entry(
        lrjax.follow_geodesics,
        {"where": lambda path, shape: len(shape) >= 2},
        params="dense",
    ),
    "accumulate_gradients": Entry(
        lrjax.accumulate_gradients,
        {
            "inner": optax.scale_by_adam(),
            "rank": 2,
            "steps": 2,
            "where": lambda path, shape: len(shape) >= 2,
        },
        params="stack",
    ),
    "alternate_factors": Entry(
        _alternate_factors,
        {"b1": 0.9, "carry_moments": True},
        {"b1": 0.5},
        gauge="any",
        transposes=False,
    ),
    "amplify_slow": Entry(
        lrjax.amplify_slow,
        {"weight": 2.0, "decay": 0.98},
        {"weight": 1.0, "decay": 0.5},
        params="dense",
    ),
    "amplify_slow(window)": Entry(
        lrjax.amplify_slow,
        {"weight": 2.0, "window": 2},
        {"weight": 1.0},
        params="dense",
        static=("window",),
    ),
    "reduce_at_checkpoints": Entry(
        lrjax.reduce_at_checkpoints,
        {"checkpoints": (0, 2), "factor": 0.5, "progress": 0.75},
        {"factor": 0.3, "progress": 0.1},
        params="dense",
        static=("checkpoints",),
    ),
    "every": Entry(lrjax.every, {"k": 2, "op": optax.scale_by_adam()}, params="dense"),
    "limit_norm_growth": Entry(
        lrjax.limit_norm_growth,
        {"max_growth": 1.01},
        {"max_growth": 0.5},
        params="dense",
    ),
    "normalize_rows": Entry(
        lrjax.normalize_rows,
        {"b2": 0.95, "eps": 1e-8, "where": lambda path, shape: len(shape) >= 2},
        {"b2": 0.5, "eps": 1e-3},
        params="dense",
    ),
    "orthogonalize_updates": Entry(
        lrjax.orthogonalize_updates,
        {"where": lambda path, shape: len(shape) >= 2},
        params="dense",
    ),
    "frank_wolfe": Entry(
        lrjax.frank_wolfe,
        {"lmo": "spectral", "radius": 2.0, "where": lambda path, shape: len(shape) >= 2},
        {"radius": 0.5},
        params="dense",
        static=("lmo",),
    ),
    "frank_wolfe(nuclear)": Entry(
        lrjax.frank_wolfe,
        {"lmo": "nuclear", "radius": 2.0, "where": lambda path, shape: len(shape) >= 2},
        {"radius": 0.5},
        params="stack",
        static=("lmo",),
    ),
    "frank_wolfe(frobenius)": Entry(
        lrjax.frank_wolfe,
        {"lmo": "frobenius", "radius": 2.0, "where": lambda path, shape: len(shape) >= 2},
        {"radius": 0.5},
        params="stack",
        static=("lmo",),
    ),
    "project_conflicts": Entry(
        _project_conflicts,
        {"margin": 0.0, "damping": 0.0},
        {"margin": 0.5, "damping": 0.2},
        params="dense",
        stacks=False,
        couples=True,
    ),
    "project_out": Entry(_project_out, {"side": "left"}, params="dense", stacks=False),
    "scale_by_width": Entry(
        _scale_by_width, {"optimizer": "sgd"}, params="dense", stacks=False
    ),
    "quantize_state": Entry(
        lrjax.quantize_state,
        {"inner": optax.scale_by_adam(), "block": 4, "min_size": 1},
        params="stack",
    ),
    "quantize_state(4 bits)": Entry(
        lrjax.quantize_state,
        {"inner": optax.scale_by_adam(), "block": 4, "min_size": 1, "bits": 4},
        params="stack",
    ),
    "stack_leaves": Entry(
        lrjax.stack_leaves,
        {"tx": lrjax.compress_momentum(2), "where": lambda path, shape: len(shape) >= 2},
        params="dense",
    ),
    "scale_by_layer_trust": Entry(
        lrjax.scale_by_layer_trust,
        {"coefficient": 0.1, "max_norm": 10.0},
        {"coefficient": 0.3, "max_norm": 1.0},
        params="dense",
    ),
    "scale_by_lion_k": Entry(
        lrjax.scale_by_lion_k,
        {"norm": "nuclear", "b1": 0.9, "b2": 0.99},
        {"b1": 0.8, "b2": 0.9},
        params="dense",
        static=("norm",),
    ),
    "scale_by_subset_norm": Entry(
        lrjax.scale_by_subset_norm,
        {"b2": 0.999, "eps": 1e-8, "numerator": optax.ema(0.9)},
        {"b2": 1.0, "eps": 1e-3},
        params="dense",
        static=("numerator",),
    ),
    "project_updates": Entry(
        lrjax.project_updates,
        {
            "inner": optax.scale_by_adam(),
            "basis": sub.Power(2),
            "schedule": sub.Periodic(2),
            "carry": sub.RotateVariance(),
            "feedback": sub.ErrorFeedback(),
            "where": lambda path, shape: len(shape) >= 2,
        },
        params="stack",
    ),
}

RECIPES: dict[str, Entry] = {
    "scaled_gd": Entry(
        lrjax.scaled_gd,
        {"learning_rate": 0.5, "damping": 1e-3},
        {"learning_rate": 0.1, "damping": 0.3},
        descends=True,
        gauge="orthogonal",
        drop_in={"learning_rate": 1e-3},
    ),
    "scaled_adamw": Entry(
        lrjax.scaled_adamw,
        {"learning_rate": 0.1, "damping": 1e-2, "eps": 1e-8},
        {"learning_rate": 0.02, "damping": 0.3, "eps": 1e-3},
        descends=True,
        composed_of=("alternate_factors", "scale_by_gram"),
        drop_in={"learning_rate": 1e-2},
    ),
    "scaled_adamw(alternating)": Entry(
        lrjax.scaled_adamw,
        {"learning_rate": 0.1, "order": "alternating"},
        {"learning_rate": 0.02},
        descends=True,
        transposes=False,
        composed_of=("alternate_factors", "scale_by_gram"),
    ),
    "alt_lora": Entry(
        lrjax.alt_lora,
        {"learning_rate": 1.0, "scale": 1.0, "b1": 0.5, "damping": 0.0},
        {"learning_rate": 0.3, "scale": 2.0, "b1": 0.9, "damping": 0.3},
        descends=True,
        gauge="any",
        transposes=False,
        composed_of=("alternate_factors", "scale_by_gram"),
        drop_in={"learning_rate": 1e-3, "b1": 0.0},
    ),
    "alt_lora_plus": Entry(
        lrjax.alt_lora_plus,
        {"learning_rate": 0.1, "eps": 1e-8},
        {"learning_rate": 0.02, "eps": 1e-3},
        descends=True,
        transposes=False,
        composed_of=("alternate_factors", "scale_by_gram"),
        drop_in={"learning_rate": 1e-2},
    ),
    "scaled_subgradient": Entry(
        lrjax.scaled_subgradient,
        {"learning_rate": 0.1},
        {"learning_rate": 0.02},
        descends=True,
        gauge="any",
        drop_in={"learning_rate": 1e-3},
    ),
    "scaled_subgradient(polyak)": Entry(
        lrjax.scaled_subgradient,
        {"learning_rate": 0.2, "f_min": 0.0},
        {"learning_rate": 0.1, "f_min": 0.1},
        extra=True,
        descends=True,
        gauge="any",
        stacks=False,
    ),
    "prec_gd": Entry(
        lrjax.prec_gd,
        {"learning_rate": 0.5},
        {"learning_rate": 0.1},
        extra=True,
        descends=True,
        gauge="orthogonal",
        composed_of=("scale_by_gram",),
        drop_in={"learning_rate": 1e-3},
    ),
    "levenberg_marquardt": Entry(
        lrjax.levenberg_marquardt,
        {"learning_rate": 1.0, "f_min": 0.0},
        {"learning_rate": 0.1, "f_min": 0.1},
        extra=True,
        descends=True,
        gauge="orthogonal",
        stacks=False,
        composed_of=(
            "scale_by_gauss_newton",
            "scale_by_polyak",
            "scale_by_target_level",
        ),
        drop_in={"learning_rate": 1e-3},
    ),
    "subgm": Entry(
        lrjax.subgm,
        {"learning_rate": 0.02},
        {"learning_rate": 0.01},
        descends=True,
        gauge="orthogonal",
        drop_in={"learning_rate": 1e-3},
    ),
    "lora_muon": Entry(
        lrjax.lora_muon,
        {"learning_rate": 0.1, "damping": 0.0},
        {"learning_rate": 0.02, "damping": 0.3},
        descends=True,
        gauge="any",
        composed_of=("scale_by_gram",),
        drop_in={"learning_rate": 1e-2},
    ),
    "lora_plus": Entry(
        lrjax.lora_plus,
        {"learning_rate": 0.02, "ratio": 16.0, "eps": 1e-8},
        {"learning_rate": 0.01, "ratio": 2.0, "eps": 1e-3},
        descends=True,
        transposes=False,
        composed_of=("scale_factors",),
        drop_in={"learning_rate": 1e-2},
    ),
    "lora_pro": Entry(
        lrjax.lora_pro,
        {"learning_rate": 1.0, "scale": 1.0, "momentum": 0.5, "damping": 0.0},
        {"learning_rate": 0.1, "scale": 2.0, "momentum": 0.9, "damping": 0.3},
        descends=True,
        gauge="any",
        composed_of=("scale_by_tangent",),
        drop_in={"learning_rate": 1e-3, "momentum": 0.0},
    ),
    "ilora": Entry(
        lrjax.ilora,
        {"learning_rate": 0.1, "strength": 0.1},
        {"learning_rate": 0.02, "strength": 0.3},
        descends=True,
        transposes=False,
        composed_of=("add_imbalance_penalty", "scale_by_gram"),
        drop_in={"learning_rate": 1e-2},
    ),
    "ilora(preconditioned)": Entry(
        lrjax.ilora,
        {"learning_rate": 0.1, "strength": 0.1, "damping": 1e-2, "ratio": 1.0},
        {"learning_rate": 0.02, "damping": 0.3, "ratio": 0.5},
        descends=True,
        composed_of=("add_imbalance_penalty", "scale_by_gram"),
    ),
    "balora": Entry(
        lrjax.balora,
        {"learning_rate": 0.1, "period": 1},
        {"learning_rate": 0.02},
        descends=True,
        composed_of=("every", "rebalance"),
        drop_in={"learning_rate": 1e-2},
    ),
    "balora(descent)": Entry(
        lrjax.balora,
        {"learning_rate": 0.5, "period": 1, "inner": optax.identity()},
        {"learning_rate": 0.1},
        descends=True,
        gauge="orthogonal",
        static=("inner",),
        composed_of=("every", "rebalance"),
    ),
    "allora": Entry(
        lrjax.allora,
        {"learning_rate": 0.1, "most": 2.0},
        {"learning_rate": 0.02, "most": 0.5},
        descends=True,
        transposes=False,
        composed_of=("scale_by_row_norms",),
        drop_in={"learning_rate": 1e-2},
    ),
    "lora_mgpo": Entry(
        lrjax.lora_mgpo,
        {"learning_rate": 0.1, "radius": 0.05, "scale": 1.0},
        {"learning_rate": 0.02, "radius": 0.1, "scale": 2.0},
        descends=True,
        composed_of=("perturb_along_momentum",),
        drop_in={"learning_rate": 1e-2},
    ),
    "aflora": Entry(
        lrjax.aflora,
        {"learning_rate": 0.1, "begin": 60, "end": 80, "window": 2, "weight_decay": 0.0},
        {"learning_rate": 0.02, "begin": 1},
        descends=True,
        stacks=False,
        couples=True,
        composed_of=("freeze_factors",),
        drop_in={"learning_rate": 1e-2, "weight_decay": 0.0},
    ),
    "lora_rite": Entry(
        lrjax.lora_rite,
        {"learning_rate": 0.1, "b1": 0.9, "b2": 0.999, "eps": 1e-6, "max_norm": 1.0},
        {"learning_rate": 0.02, "b1": 0.5, "b2": 0.9, "eps": 1e-2, "max_norm": 0.1},
        descends=True,
        gauge="any",
        stacks=False,
        composed_of=("scale_by_gram", "scale_by_matrix_adam"),
        drop_in={"learning_rate": 1e-2},
    ),
    "loro": Entry(
        lrjax.loro,
        {
            "learning_rate": 0.5,
            "damping": 0.0,
            "exact_every": 1,
            "inner": optax.identity(),
        },
        {"learning_rate": 0.1, "damping": 0.3},
        descends=True,
        gauge="any",
        static=("exact_every", "inner"),
        composed_of=("every", "retract", "scale_by_tangent"),
        drop_in={"learning_rate": 1e-2},
    ),
    "maestro": Entry(
        lrjax.maestro,
        {"learning_rate": 0.2, "strength": 1e-4, "threshold": 1e-5, "period": 2},
        {"learning_rate": 0.02, "strength": 1e-2, "threshold": 1e-2},
        descends=True,
        composed_of=("add_hierarchical_lasso", "prune_columns"),
        drop_in={"learning_rate": 1e-3},
    ),
    "dlrt": Entry(
        lrjax.dlrt,
        {"learning_rate": 0.1, "tol": 0.1},
        {"learning_rate": 0.02, "tol": 0.3},
        params="svd",
        descends=True,
        composed_of=("dynamical_low_rank",),
        drop_in={"learning_rate": 1e-2},
    ),
    "robust_dlrt": Entry(
        lrjax.robust_dlrt,
        {"learning_rate": 0.1, "tol": 0.1, "penalty": 0.01, "every": 5},
        {"learning_rate": 0.02, "tol": 0.3, "penalty": 0.1},
        params="svd",
        descends=True,
        composed_of=("add_condition_penalty", "dynamical_low_rank"),
        drop_in={"learning_rate": 1e-2},
    ),
    "cond_lr": Entry(
        lrjax.cond_lr,
        {"learning_rate": 1.0, "condition": 10.0, "momentum": 0.3},
        {"learning_rate": 0.5, "condition": 1.5, "momentum": 0.5},
        params="svd",
        descends=True,
        composed_of=("dynamical_low_rank",),
        drop_in={"learning_rate": 1e-3},
    ),
    "riemannian_sgd": Entry(
        lrjax.riemannian_sgd,
        {"learning_rate": 1.0, "momentum": 0.5},
        {"learning_rate": 0.1, "momentum": 0.9},
        params="svd",
        descends=True,
        composed_of=("riemannian",),
        drop_in={"learning_rate": 1e-3, "momentum": 0.0},
    ),
    "sst": Entry(
        lrjax.sst,
        {"learning_rate": 0.1, "rank": 1, "period": 4, "refactor_every": 8, "warmup": 1},
        {"learning_rate": 0.02, "warmup": 2.0},
        params="svd",
        descends=True,
        static=("rank",),
        composed_of=("sample_directions",),
        drop_in={"learning_rate": 1e-2},
    ),
    "opsa": Entry(
        lrjax.opsa,
        {"learning_rate": 1.0, "f_min": "search"},
        {"learning_rate": 0.5},
        extra=True,
        descends=True,
        gauge="orthogonal",
        stacks=False,
        drop_in={"learning_rate": 1e-3},
    ),
    "opsa(length)": Entry(
        lrjax.opsa,
        {"learning_rate": 0.1, "f_min": None},
        {"learning_rate": 0.02},
        descends=True,
        gauge="orthogonal",
    ),
    "opsa(reference)": Entry(
        lrjax.opsa,
        {
            "learning_rate": 1.0,
            "f_min": 0.0,
            "damping": 2.0,
            "relative": False,
            "loss_power": None,
            "rebalance": True,
        },
        {"learning_rate": 0.1, "f_min": 0.1, "damping": 1.0},
        extra=True,
        descends=True,
        gauge="orthogonal",
        stacks=False,
    ),
}


def _every_matrix(path, shape):
    return len(shape) >= 2


_SHAPE_DECIDING = {"rank", "where", "blocks", "fraction", "block", "min_size"}


def _in_subspace(factory, rate=0.1, *, of=(), drop_in=None, **arguments):
    """An entry of an optimizer that works in subspaces of rank 2."""
    own = {"learning_rate": rate, "rank": 2, "where": _every_matrix, **arguments}
    return Entry(
        factory,
        own,
        {"learning_rate": 0.02},
        "stack",
        descends=True,
        static=tuple(_SHAPE_DECIDING & {*own}),
        composed_of=of,
        drop_in={"learning_rate": 1e-2} if drop_in is None else drop_in,
    )


def _looped(*parts):
    return ("project_updates", *parts)


_ROWS = ("SelectedRows", "Always", "ErrorFeedback", "orthogonalize_updates")


def _of_matrices(factory, rate=0.1, *, of, **arguments):
    """An entry of an optimizer of whole matrices."""
    settings = {"learning_rate": rate, "where": _every_matrix, "weight_decay": 0.0}
    return Entry(
        factory,
        {**settings, **arguments},
        {"learning_rate": 0.02},
        "stack",
        descends=True,
        static=tuple(_SHAPE_DECIDING & {*settings, *arguments}),
        composed_of=of,
        drop_in={"learning_rate": 1e-2, "weight_decay": 0.0},
    )


RECIPES |= {
    "adam_sn": Entry(
        lrjax.adam_sn,
        {"learning_rate": 0.5},
        {"learning_rate": 0.02},
        "stack",
        descends=True,
        composed_of=("scale_by_subset_norm",),
        drop_in={"learning_rate": 1e-2},
    ),
    "apollo": _in_subspace(
        lrjax.apollo, of=_looped("Gaussian", "Periodic", "ScaledGradient")
    ),
    "autolora": Entry(
        lrjax.autolora,
        {"learning_rate": 0.1, "checkpoints": (0, 2), "momentum": 0.5, "factor": 0.5},
        {"learning_rate": 0.02, "momentum": 0.9, "factor": 0.3},
        "stack",
        descends=True,
        static=("checkpoints",),
        composed_of=("reduce_at_checkpoints",),
        drop_in={"learning_rate": 1e-3, "momentum": 0.0, "weight_decay": 0.0},
    ),
    "coap": _in_subspace(
        lrjax.coap,
        of=_looped("CorrelationDescent", "Periodic", "Rotate", "Project"),
        refresh_every=2,
        recalibrate=2,
    ),
    "dion": _in_subspace(
        lrjax.dion,
        weight_decay=0.0,
        drop_in={"learning_rate": 1e-2, "weight_decay": 0.0},
    ),
    "dion2": _of_matrices(lrjax.dion2, of=_looped(*_ROWS), fraction=0.25),
    "dion3": _of_matrices(lrjax.dion3, of=_looped(*_ROWS, "normalize_rows"), fraction=0.25),
    "fira": _in_subspace(
        lrjax.fira, of=_looped("SVD", "Periodic", "ScaledResidual"), refresh_every=2
    ),
    # Each change of a Gaussian basis of rank r lengthens the momentum by sqrt(8/r).
    "flora": _in_subspace(
        lrjax.flora, of=_looped("Gaussian", "Periodic", "Rotate", "Blend"), refresh_every=20
    ),
    "frugal": _in_subspace(
        lrjax.frugal,
        of=_looped("SVD", "Periodic", "Rotate", "SignResidual"),
        refresh_every=2,
    ),
    "galore": _in_subspace(lrjax.galore, refresh_every=2, scale=1.0),
    "galore_plus": _in_subspace(
        lrjax.galore_plus,
        of=_looped("Shared", "RandomizedSVD", "Periodic", "SparseResidual"),
        refresh_every=2,
        scale=1.0,
        fraction=0.1,
    ),
    "golore": _in_subspace(
        lrjax.golore,
        of=_looped("Switch", "SVD", "RandomOrthonormal", "Periodic", "Rotate", "Project"),
        refresh_every=2,
        scale=1.0,
    ),
    "grass": _in_subspace(
        lrjax.grass,
        of=_looped("SelectedRows", "Periodic", "SeededReset", "Project"),
        refresh_every=2,
        scale=1.0,
    ),
    "grassmann_sgd": Entry(
        lrjax.grassmann_sgd,
        {"learning_rate": 0.1, "momentum": 0.9, "where": _every_matrix},
        {"learning_rate": 0.02, "momentum": 0.5},
        "stack",
        descends=True,
        static=("where",),
        composed_of=("follow_geodesics",),
        drop_in={"learning_rate": 1e-3},
    ),
    "kl_shampoo": _of_matrices(
        lrjax.kl_shampoo, of=("scale_by_kl_shampoo",), refresh_every=2
    ),
    "ldadam": _in_subspace(
        lrjax.ldadam,
        of=_looped("Power", "SVD", "Always", "RotateVariance", "ErrorFeedback"),
    ),
    "mofasgd": _in_subspace(lrjax.mofasgd, of=("factored_momentum",)),
    "muon": _of_matrices(lrjax.muon, of=("orthogonalize_updates",)),
    "normuon": _of_matrices(lrjax.normuon, of=("normalize_rows", "orthogonalize_updates")),
    "online_subspace_descent": _in_subspace(
        lrjax.online_subspace_descent, of=_looped("Oja", "Always")
    ),
    # A step is eleven times the gradient's; the valley of Rosenbrock is steep.
    "power_sgd": _in_subspace(
        lrjax.power_sgd, of=("compress_momentum",), drop_in={"learning_rate": 1e-4}
    ),
    "proximal_gradient": Entry(
        lrjax.proximal_gradient,
        {"learning_rate": 0.5, "nuclear_weight": 0.01, "where": _every_matrix},
        {"learning_rate": 0.1, "nuclear_weight": 0.1},
        "stack",
        descends=True,
        composed_of=("shrink_singular_values",),
        drop_in={"learning_rate": 1e-3, "nuclear_weight": 0.0},
    ),
    "mfac": Entry(
        lrjax.mfac,
        {"learning_rate": 3.0, "rank": 3, "momentum": 0.9},
        {"learning_rate": 1.0, "momentum": 0.5},
        "stack",
        descends=True,
        stacks=False,
        static=("rank", "dtype"),
        composed_of=("scale_by_gradient_window",),
        drop_in={"learning_rate": 3e-3, "rank": 4},
    ),
    "psgd": Entry(
        lrjax.psgd,
        {"learning_rate": 0.03, "rank": 2, "rate": 0.1},
        {"learning_rate": 0.1, "rate": 0.2},
        "stack",
        descends=True,
        stacks=False,
        static=("rank",),
        composed_of=("scale_by_psgd",),
        drop_in={"learning_rate": 1e-3, "rank": 2},
    ),
    "psgd_kron": _of_matrices(lrjax.psgd_kron, of=("scale_by_psgd_kron",)),
    "q_galore": _in_subspace(
        lrjax.q_galore,
        of=_looped("Quantized", "SVD", "Adaptive", "Project", "quantize_state"),
        refresh_every=2,
        scale=1.0,
        block=8,
        min_size=1,
    ),
    "sara": _in_subspace(
        lrjax.sara,
        of=_looped("SampledSVD", "Periodic", "Project"),
        refresh_every=2,
        scale=1.0,
    ),
    "snsm": _in_subspace(
        lrjax.snsm,
        0.5,
        of=_looped("SVD", "Periodic", "Reset", "Residual", "scale_by_subset_norm"),
        refresh_every=2,
    ),
    "soap": Entry(
        lrjax.soap,
        {
            "learning_rate": 0.1,
            "where": _every_matrix,
            "refresh_every": 2,
            "side": "short",
        },
        {"learning_rate": 0.02},
        "stack",
        descends=True,
        static=("where",),
        composed_of=("rotate_updates",),
        drop_in={"learning_rate": 1e-2, "weight_decay": 0.0},
    ),
    "subspace_adam": _in_subspace(lrjax.subspace_adam, blocks=2),
    "subtrack": _in_subspace(
        lrjax.subtrack,
        of=_looped("Geodesic", "Periodic", "RotateVariance", "ScaledResidual"),
        refresh_every=2,
    ),
    "trp": Entry(
        lrjax.trp,
        {
            "learning_rate": 0.1,
            "energy": 0.99,
            "period": 2,
            "nuclear_weight": 3e-4,
            "where": _every_matrix,
        },
        {"learning_rate": 0.02, "energy": 0.9, "nuclear_weight": 0.1},
        "stack",
        descends=True,
        static=("where",),
        composed_of=("add_nuclear_norm", "every"),
        drop_in={"learning_rate": 1e-3, "where": None},
    ),
    "sumo": _in_subspace(
        lrjax.sumo,
        0.3,
        of=_looped(
            "RandomizedSVD",
            "Periodic",
            "Rotate",
            "Project",
            "orthogonalize_updates",
            "limit_norm_growth",
        ),
        refresh_every=2,
    ),
}

ENTRIES = {**TRANSFORMS, **RECIPES}

# Exported next to the transforms without being transforms themselves.
NOT_TRANSFORMS = {
    "append_directions",
    "cubic_schedule",
    "data_parallel_specs",
    "dequantize",
    "grow_basis",
    "hessian_product",
    "is_hidden_matrix",
    "rounding",
    "limit_growth",
    "matrix_shape",
    "on_matrices",
    "on_mesh",
    "pairs_by_name",
    "perturbed_params",
    "quantize",
    "random_subspace",
    "register_moments",
    "sample_prefix",
    "state_specs",
    "step_by_layer",
    "surrogate_steps",
    "trajectory_subspace",
    "unit_norm",
    "zeroth_order_gradient",
}

# The plug-ins of the subspace loop, by kind: found among the public classes.
KINDS = {
    "basis": sub.Basis,
    "schedule": sub.Schedule,
    "carry": sub.MomentTransport,
    "lift": sub.Lift,
    "feedback": sub.ErrorFeedback,
}
_SVD = sub.SVD(2)


def _squashed(x):
    return jnp.tanh(x)


# What they are made with, where that is not a rank for a basis and nothing for others.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "Adaptive": {"steps": 1, "window": 1},
    "CorrelationDescent": {"rank": 2, "period": 1, "recalibrate": 2},
    "Fixed": {"matrix": jnp.eye(6)[:, :2], "side": "short"},
    "Periodic": {"steps": 2},
    "Quantized": {"base": _SVD, "bits": 8, "group": 4},
    "SampledResidual": {"transform": _squashed},
    "Shared": {"base": _SVD, "choice": "all"},
    "SparseResidual": {"fraction": 0.25},
    "Switch": {"before": _SVD, "after": sub.RandomOrthonormal(2), "at": 1},
    "Transformed": {"transform": _squashed},
}
# Further settings of a plug-in that run other code.
VARIANTS: dict[str, dict[str, Any]] = {
    "Power(blocks)": {"rank": 2, "blocks": 2},
    "Power(blend)": {"rank": 2, "blend": 0.9, "first": _SVD},
    "SelectedRows(sampled)": {"rank": 2, "choice": "sampled"},
    "SelectedRows(topk_l1)": {"rank": 2, "choice": "topk_l1"},
    "Quantized(4 bits)": {"base": _SVD, "bits": 4, "group": 4},
    "Shared(random)": {"base": _SVD, "choice": "random"},
    "ScaledResidual(tensor)": {"over": "tensor", "max_growth": None},
}


def public_plugins() -> dict[str, type]:
    """The classes of plug-ins that ``lrjax.subspaces`` exports, but for abstract ones."""
    kinds = tuple(KINDS.values())
    found = {n: x for n, x in vars(sub).items() if inspect.isclass(x)}
    return {
        name: cls
        for name, cls in found.items()
        if issubclass(cls, kinds) and not inspect.isabstract(cls)
    }


def in_loop(cls: type, **arguments) -> optax.GradientTransformationExtraArgs:
    """A cheap optimizer with one plug-in in its place."""
    plugin = cls(**arguments)
    place = next(place for place, kind in KINDS.items() if isinstance(plugin, kind))
    settings = {
        "basis": sub.Power(2),
        "schedule": sub.Periodic(2),
        "carry": sub.Rotate(),
        "where": _every_matrix,
    }
    inner = optax.scale_by_adam()
    return lrjax.project_updates(inner, **{**settings, place: plugin})


def numbers_of(cls: type, arguments: dict[str, Any]) -> dict[str, float]:
    """The numbers of a plug-in, which may be tracers, each with half of its value."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    given = {name: arguments.get(name, field.default) for name, field in fields.items()}
    return {
        name: value / 2 if isinstance(value, float) else value + 1
        for name, value in given.items()
        if isinstance(value, int | float) and _takes_arrays(fields[name])
    }


def _takes_arrays(field: dataclasses.Field) -> bool:
    """Whether a field is a number that may be traced, with or without None."""
    kinds = set(get_args(field.type))
    return kinds >= set(get_args(ArrayLike)) or kinds == {int, jax.Array}


def _plugin(cls: type, arguments: dict[str, Any] | None) -> Entry:
    if arguments is None:
        arguments = {"rank": 2} if issubclass(cls, sub.Basis) else {}
    numbers = numbers_of(cls, arguments)
    given = {f.name: f.default for f in dataclasses.fields(cls) if f.name in numbers}
    return Entry(
        functools.partial(in_loop, cls),
        {**given, **arguments},
        numbers,
        "stack",
        # One basis for the members of a stack is not one basis for each.
        stacks=cls is not sub.Shared,
    )


_PUBLIC = public_plugins()
PLUGINS = {name: _plugin(cls, ARGUMENTS.get(name)) for name, cls in _PUBLIC.items()}
PLUGINS |= {name: _plugin(_PUBLIC[name.split("(")[0]], a) for name, a in VARIANTS.items()}

# Whoever has kernels of its own passes the whole contract.
PARTS = {n: e for n, e in {**ENTRIES, **PLUGINS}.items() if not e.composed_of}
