"""Every public transform and recipe, with what the contract tests must know about it.

A part that is exported from ``lrjax.transforms`` or ``lrjax.recipes`` and not entered
here makes ``tests/contract/test_registered.py`` fail.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import optax

import lrjax
from tests.helpers import random_low_rank


@dataclasses.dataclass(frozen=True)
class Entry:
    """One configuration of a public transform.

    Attributes:
        factory: the public function.
        arguments: how it is called here.
        numbers: names of arguments that may be tracers, with a second value each.
        params: ``"pairs"``: a tree with LowRank nodes; ``"dense"``: a tree of matrices;
            ``"stack"``: one stack of matrices.
        extra: whether ``update`` needs ``value`` and ``grad``.
        descends: whether it is an optimizer that lowers a loss by itself.
        gauge: under which change of factors, (L Q, R Q⁻ᵀ), the step of the product is
            the same: any invertible Q, orthogonal Q, or none.
        transposes: whether swapping the factors of the input swaps those of the output.
        stacks: whether a stack of matrices is a loop over its layers.
        static: arguments that ``inject_hyperparams`` must not touch.
        setting: whether it is a mere setting of a registered part that passes the whole
            contract, so that the checks of composition need not run again.
        shards: whether tall factors stay sharded through an update.
    """

    factory: Callable[..., optax.GradientTransformation]
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)
    params: Literal["pairs", "dense", "stack"] = "pairs"
    extra: bool = False
    descends: bool = False
    gauge: Literal["any", "orthogonal", "none"] = "none"
    transposes: bool = True
    stacks: bool = True
    static: tuple[str, ...] = ()
    setting: bool = False
    shards: bool = True

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


PARAMS = {"pairs": pair_params, "dense": dense_params, "stack": stack_params}


def loss(params):
    """A smooth loss of all numbers of a tree; zero-curvature directions included."""
    dense = jax.tree.map(
        lambda x: x.materialize() if lrjax.is_low_rank(x) else x,
        params,
        is_leaf=lrjax.is_low_rank,
    )
    leaves = jax.tree.leaves(dense)
    return sum(jnp.mean((x.astype(jnp.float32) - 0.5) ** 2) for x in leaves)


def pair_rule(path):
    """The rule for on_pairs on a tree of LowRank nodes, whose leaves have their names."""
    return lrjax.pairs_by_name("left", "right", transpose_right=False)(path)


def _project_out(side):
    sizes = {"tall": (12, 2), "wide": (8, 2), "stack": (3, 8, 2)}
    basis = {name: jnp.linalg.qr(jnp.ones(shape))[0] for name, shape in sizes.items()}
    return lrjax.project_out({**basis, "bias": None, "none": None}, side=side)


def _on_pairs(damping):
    return lrjax.on_pairs(lrjax.scale_by_gram(damping), pair_rule)


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
    "scale_by_level": Entry(
        lrjax.scale_by_level,
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
    "add_nuclear_norm": Entry(
        lrjax.add_nuclear_norm, {"weight": 0.1}, {"weight": 0.3}, gauge="orthogonal"
    ),
    "scale_factors": Entry(
        lrjax.scale_factors,
        {"left": 16.0, "right": 1.0},
        {"left": 2.0, "right": 3.0},
        gauge="orthogonal",
        transposes=False,
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
    "retract": Entry(lrjax.retract, gauge="orthogonal", setting=True),
    "rebalance": Entry(lrjax.rebalance, gauge="orthogonal"),
    "on_pairs": Entry(_on_pairs, {"damping": 0.1}, {"damping": 0.3}, gauge="orthogonal"),
    "compress_momentum": Entry(
        lrjax.compress_momentum,
        {"rank": 2, "where": lambda path, shape: len(shape) >= 2, "decay": 0.9},
        {"decay": 0.5},
        params="stack",
        static=("rank", "where", "normalize", "reduce"),
    ),
    "factored_momentum": Entry(
        lrjax.factored_momentum,
        {"rank": 2, "where": lambda path, shape: len(shape) >= 2, "decay": 0.9},
        {"decay": 0.5},
        params="stack",
        static=("rank", "where"),
        setting=True,
    ),
    "scale_by_low_rank_curvature": Entry(
        lrjax.scale_by_low_rank_curvature,
        {"rank": 2, "rate": 0.1},
        {"rate": 0.2},
        params="stack",
        stacks=False,
        static=("rank",),
        setting=True,
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
        setting=True,
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
        setting=True,
    ),
    "amplify_slow": Entry(
        lrjax.amplify_slow,
        {"weight": 2.0, "decay": 0.98},
        {"weight": 1.0, "decay": 0.5},
        params="dense",
        setting=True,
    ),
    "amplify_slow(window)": Entry(
        lrjax.amplify_slow,
        {"weight": 2.0, "window": 2},
        {"weight": 1.0},
        params="dense",
        static=("window",),
        setting=True,
    ),
    "every": Entry(lrjax.every, {"k": 2, "op": optax.scale_by_adam()}, params="dense"),
    "limit_norm_growth": Entry(
        lrjax.limit_norm_growth,
        {"growth": 1.01},
        {"growth": 0.5},
        params="dense",
        setting=True,
    ),
    "orthogonalize_updates": Entry(
        lrjax.orthogonalize_updates,
        {"where": lambda path, shape: len(shape) >= 2},
        params="dense",
        setting=True,
    ),
    "project_out": Entry(_project_out, {"side": "left"}, params="dense", stacks=False),
    "quantize_state": Entry(
        lrjax.quantize_state,
        {"inner": optax.scale_by_adam(), "block": 4, "min_size": 1},
        params="stack",
    ),
    "scale_by_layer_trust": Entry(
        lrjax.scale_by_layer_trust,
        {"coefficient": 0.1, "max_norm": 10.0},
        {"coefficient": 0.3, "max_norm": 1.0},
        params="dense",
        setting=True,
    ),
    "scale_by_lion_k": Entry(
        lrjax.scale_by_lion_k,
        {"norm": "nuclear", "b1": 0.9, "b2": 0.99},
        {"b1": 0.8, "b2": 0.9},
        params="dense",
        static=("norm",),
        setting=True,
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
            "basis": lrjax.subspaces.power(2),
            "schedule": lrjax.subspaces.every(2),
            "carry": lrjax.subspaces.rotate_variance(),
            "feedback": lrjax.subspaces.error_feedback(),
            "where": lambda path, shape: len(shape) >= 2,
        },
        params="stack",
    ),
}

RECIPES: dict[str, Entry] = {
    "scaled_gd": Entry(
        lrjax.scaled_gd,
        {"learning_rate": 0.5, "damping": 1e-6},
        {"learning_rate": 0.1, "damping": 0.3},
        descends=True,
        gauge="orthogonal",
    ),
    "scaled_subgradient": Entry(
        lrjax.scaled_subgradient,
        {"learning_rate": 0.1},
        {"learning_rate": 0.02},
        descends=True,
        gauge="any",
    ),
    "scaled_subgradient(polyak)": Entry(
        lrjax.scaled_subgradient,
        {"learning_rate": 1.0, "f_min": 0.0},
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
        setting=True,
    ),
    "levenberg_marquardt": Entry(
        lrjax.levenberg_marquardt,
        {"learning_rate": 1.0, "f_min": 0.0},
        {"learning_rate": 0.1, "f_min": 0.1},
        extra=True,
        descends=True,
        gauge="orthogonal",
        stacks=False,
        setting=True,
    ),
    "subgm": Entry(
        lrjax.subgm,
        {"learning_rate": 0.02},
        {"learning_rate": 0.01},
        descends=True,
        gauge="orthogonal",
        setting=True,
    ),
    "lora_muon": Entry(
        lrjax.lora_muon,
        {"learning_rate": 0.1, "damping": 0.0},
        {"learning_rate": 0.02, "damping": 0.3},
        descends=True,
        gauge="any",
        setting=True,
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
        setting=True,
    ),
    "opsa": Entry(
        lrjax.opsa,
        {"learning_rate": 0.1},
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


def _in_subspace(factory, rate=0.1, **arguments):
    """An entry of an optimizer that works in subspaces of rank 2."""
    own = {"learning_rate": rate, "rank": 2, "where": _every_matrix, **arguments}
    static = ("rank", "where", "refresh_every", "blocks", "recalibrate")
    static += ("fraction", "block", "min_size")
    static = tuple(set(static) & set(inspect.signature(factory).parameters))
    return Entry(
        factory,
        own,
        {"learning_rate": 0.02},
        "stack",
        descends=True,
        static=static,
        setting=factory not in (lrjax.subspace_adam, lrjax.galore, lrjax.dion),
    )


RECIPES |= {
    "adam_sn": Entry(
        lrjax.adam_sn,
        {"learning_rate": 0.5},
        {"learning_rate": 0.02},
        "stack",
        descends=True,
        setting=True,
    ),
    "galore_plus": _in_subspace(
        lrjax.galore_plus, refresh_every=2, scale=1.0, fraction=0.1
    ),
    "grass": _in_subspace(lrjax.grass, refresh_every=2, scale=1.0),
    "q_galore": _in_subspace(
        lrjax.q_galore, refresh_every=2, scale=1.0, block=8, min_size=1
    ),
    "sara": _in_subspace(lrjax.sara, refresh_every=2, scale=1.0),
    "snsm": _in_subspace(lrjax.snsm, 0.5, refresh_every=2),
    "sumo": _in_subspace(lrjax.sumo, 0.3, refresh_every=2),
    "apollo": _in_subspace(lrjax.apollo),
    "coap": _in_subspace(lrjax.coap, refresh_every=2, recalibrate=2),
    "dion": _in_subspace(lrjax.dion, weight_decay=0.0),
    "fira": _in_subspace(lrjax.fira, refresh_every=2),
    # Each change of a Gaussian basis of rank r lengthens the momentum by sqrt(8/r).
    "flora": _in_subspace(lrjax.flora, refresh_every=20),
    "frugal": _in_subspace(lrjax.frugal, refresh_every=2),
    "galore": _in_subspace(lrjax.galore, refresh_every=2, scale=1.0),
    "golore": _in_subspace(lrjax.golore, refresh_every=2, scale=1.0),
    "ldadam": _in_subspace(lrjax.ldadam),
    "mofasgd": _in_subspace(lrjax.mofasgd),
    "online_subspace_descent": _in_subspace(lrjax.online_subspace_descent),
    "power_sgd": _in_subspace(lrjax.power_sgd),
    "psgd": Entry(
        lrjax.psgd,
        {"learning_rate": 0.03, "rank": 2, "rate": 0.1},
        {"learning_rate": 0.1, "rate": 0.2},
        "stack",
        descends=True,
        stacks=False,
        static=("rank",),
        setting=True,
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
        static=("where", "refresh_every", "max_side"),
        setting=True,
    ),
    "subspace_adam": _in_subspace(lrjax.subspace_adam, blocks=2),
    "subtrack": _in_subspace(lrjax.subtrack, refresh_every=2),
}

ENTRIES = {**TRANSFORMS, **RECIPES}
# What has states and kernels of its own; other recipes are put together from it.
PARTS = {**TRANSFORMS, **{name: e for name, e in RECIPES.items() if not e.setting}}

# Exported next to the transforms without being transforms themselves.
NOT_TRANSFORMS = {"data_parallel_specs", "pairs_by_name", "state_specs", "unit_norm"}
