"""The programs that are compiled for accelerators, and timed on those that are there.

Every recipe's train step on one layer, fits and solvers, the gradient of adapters, the
parts that decide how long a compilation takes, and updates of sharded matrices.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import lrjax


SIDE, RANK, BATCH = 256, 32, 64
# The recipes of pairs of factors. All others are for matrices.
OF_PAIRS = {
    *("alt_lora", "alt_lora_plus", "levenberg_marquardt", "lora_muon", "lora_plus"),
    *("lora_pro", "lora_rite", "loro", "maestro", "opsa", "prec_gd"),
    *("scaled_adamw", "scaled_gd", "scaled_subgradient", "subgm"),
    *("aflora", "allora", "balora", "ilora", "lora_mgpo"),
}
# And those of nodes whose bases move.
OF_SVD_FORMS = {"cond_lr", "dlrt", "riemannian_sgd", "robust_dlrt", "sst"}
# What CI compiles for a TPU: some of each kind.
QUICK = (
    *("adam", "subspace_adam", "galore", "apollo", "dion", "soap", "mofasgd"),
    *("scaled_gd", "lora_muon", "loro", "orthogonalize_updates", "polar muon"),
    *("fit_robust_pca", "fit_completion", "solve", "lora gradient"),
    *("orthonormalize cholesky", "subspace_adam of 8 layers"),
    *("subspace_adam by rows", "subspace_adam by layer", "dion by columns"),
)


@dataclasses.dataclass(frozen=True)
class Program:
    """A function and how its arguments are made.

    Attributes:
        function: a pure function of arrays.
        arguments: makes its arguments from a key, all of them arrays.
        donate: the arguments whose memory it may use for its results.
        specs: how arguments lie on eight devices, from their shapes; ``None`` is for one.
    """

    function: Callable[..., Any]
    arguments: Callable[[jax.Array], tuple]
    donate: tuple[int, ...] = ()
    specs: Callable[[tuple, Mesh], tuple] | None = None

    def jitted(self, **options) -> Any:
        """The function as it is run."""
        return jax.jit(self.function, donate_argnums=self.donate, **options)

    def lower(self, devices: Sequence[jax.Device]) -> jax.stages.Lowered:
        """The program for the first of these devices, or for all eight of them."""
        shapes = jax.eval_shape(self.arguments, jr.key(0))
        count = 1 if self.specs is None else 8
        mesh = Mesh(np.array(devices[:count]), ("x",))
        if self.specs is None:
            places, options = jax.tree.map(lambda x: NamedSharding(mesh, P()), shapes), {}
        else:
            places = self.specs(shapes, mesh)
            options = {"out_shardings": tuple(places[i] for i in self.donate)}
        arguments = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            shapes,
            places,
        )
        return self.jitted(**options).lower(*arguments)


def recipes() -> dict[str, Callable[..., optax.GradientTransformation]]:
    """The public recipes by name."""
    return {n: f for n, f in vars(lrjax.recipes).items() if inspect.isfunction(f)}


def optimizer(name: str) -> optax.GradientTransformationExtraArgs:
    """A recipe with its defaults at this rank, or Adam."""
    factory = optax.adam if name == "adam" else recipes()[name]
    taken = inspect.signature(factory).parameters
    # The rank of psgd is that of one preconditioner of all parameters.
    own = {"rank": RANK} if "rank" in taken and name != "psgd" else {}
    return optax.with_extra_args_support(factory(learning_rate=1e-3, **own))


def train_step(tx: optax.GradientTransformationExtraArgs, params) -> Program:
    """Gradient, update and new parameters of one layer."""

    def loss(params, x, y):
        matrix = params["layer"]
        if isinstance(matrix, lrjax.SVDForm):
            matrix = matrix.to_low_rank()
        if lrjax.is_low_rank(matrix):
            x, matrix = x @ matrix.left, matrix.right.T
        return jnp.mean((jnp.tanh(x @ matrix + params["bias"][None]) - y) ** 2)

    def step(params, state, x, y):
        value, grads = jax.value_and_grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params, value=value, grad=grads)
        return optax.apply_updates(params, updates), state, value

    def arguments(key):
        start = params(key)
        x, y = jr.normal(key, (2, BATCH, SIDE))
        return start, tx.init(start), x, y

    return Program(step, arguments, donate=(0, 1))


def layer(key: jax.Array) -> dict:
    """A matrix and a vector."""
    return {"layer": jr.normal(key, (SIDE, SIDE)) / SIDE**0.5, "bias": jnp.zeros(SIDE)}


def factored_layer(key: jax.Array) -> dict:
    """The same with the matrix in factors."""
    left, right = jr.normal(key, (2, SIDE, RANK)) / SIDE**0.5
    return {"layer": lrjax.LowRank(left, right), "bias": jnp.zeros(SIDE)}


def svd_layer(key: jax.Array) -> dict:
    """The same with orthonormal factors around a core."""
    left, right = jnp.linalg.qr(jr.normal(key, (2, SIDE, RANK)))[0]
    return {"layer": lrjax.SVDForm(left, jnp.eye(RANK), right), "bias": jnp.zeros(SIDE)}


def start_of(name: str) -> Callable[[jax.Array], dict]:
    """How the parameters of a recipe are made."""
    if name in OF_SVD_FORMS:
        return svd_layer
    return factored_layer if name in OF_PAIRS else layer


def update(tx: optax.GradientTransformation, shapes: dict, spec=None) -> Program:
    """The update of a tree of matrices, sharded like this over eight devices."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def arguments(key):
        params = {name: jr.normal(key, shape) for name, shape in shapes.items()}
        return params, tx.init(params), jax.tree.map(jnp.ones_like, params)

    def specs(arguments, mesh):
        place = NamedSharding(mesh, spec)
        params = jax.tree.map(lambda _: place, arguments[0])
        return params, lrjax.state_specs(tx, arguments[0], params), params

    return Program(step, arguments, (0, 1), None if spec is None else specs)


def lora_gradient() -> Program:
    """The gradient of adapters of two layers."""

    def loss(params, frozen, model, x, y):
        for bound in lrjax.bind(model, eqx.combine(params, frozen)):
            x = jax.vmap(bound)(jnp.tanh(x))
        return jnp.mean((x - y) ** 2)

    def arguments(key):
        model = [eqx.nn.Linear(SIDE, SIDE, key=k) for k in jr.split(key)]
        adapters = lrjax.adapt(model, lrjax.LoRA(rank=8), key=key)
        x, y = jr.normal(key, (2, BATCH, SIDE))
        return *lrjax.partition(adapters), model, x, y

    return Program(jax.value_and_grad(loss), arguments)


def folds() -> Program:
    """Adapters of two layers, folded into the weights where they are due."""
    tx, kind = optax.adam(1e-3), lrjax.LoRA(rank=8)
    rule = lrjax.adapters.Restart(kind, lrjax.adapters.ResetMoments(tx))

    def arguments(key):
        model = [eqx.nn.Linear(SIDE, SIDE, key=k) for k in jr.split(key)]
        adapters = lrjax.adapt(model, kind, key=key)
        state = tx.init(lrjax.partition(adapters)[0])
        return jnp.ones((), jnp.int32), model, adapters, state

    return Program(lrjax.fold(100, rule, key=jr.key(0)), arguments, donate=(1, 2, 3))


def _arrays(function: Callable) -> Callable:
    """The function with what it returns as arrays alone."""
    return lambda *args: jax.tree.leaves(eqx.filter(function(*args), eqx.is_array))


def robust_pca() -> Program:
    return Program(
        _arrays(lrjax.fit_robust_pca), lambda key: (jr.normal(key, (SIDE, SIDE // 2)),)
    )


def completion() -> Program:
    def fit(rows, cols, values):
        return lrjax.fit_completion(rows, cols, values, (SIDE, SIDE), rank=8)

    def arguments(key):
        rows, cols = jr.randint(key, (2, 32 * SIDE), 0, SIDE)
        return rows, cols, jr.normal(key, rows.shape)

    return Program(_arrays(fit), arguments)


def solve() -> Program:
    def run(problem):
        start = lrjax.spectral_init(problem, 8, key=jr.key(0))
        return lrjax.solve(problem, lrjax.scaled_gd(), start, steps=100)

    return Program(
        _arrays(run),
        lambda key: (lrjax.matrix_completion(key, (SIDE, SIDE), 8),),
    )


def of_matrix(function: Callable, *shape: int) -> Program:
    """A function of one matrix."""
    return Program(function, lambda key: (jr.normal(key, shape),))


def programs() -> dict[str, Program]:
    """All of them, by name."""
    steps = {
        name: train_step(optimizer(name), start_of(name)) for name in ("adam", *recipes())
    }
    linalg = lrjax.linalg
    one, tall = {"layer": (SIDE, SIDE)}, {"layer": (SIDE, SIDE // 2)}
    leaves = {f"layer {i}": (SIDE, SIDE) for i in range(8)}
    stack, large = {"layers": (8, SIDE, SIDE)}, {"layers": (4, 2048, 2048)}
    parts = {
        "fit_robust_pca": robust_pca(),
        "fit_completion": completion(),
        "solve": solve(),
        "lora gradient": lora_gradient(),
        "lora folds": folds(),
        **{
            f"orthonormalize {method}": of_matrix(
                lambda x, method=method: linalg.orthonormalize(x, method=method), 2048, 256
            )
            for method in ("qr", "cholesky")
        },
        "polar muon": of_matrix(lambda x: linalg.polar(x, method="muon"), SIDE, SIDE),
        "orthogonalize_updates": update(lrjax.orthogonalize_updates(), one),
        "optax muon": update(optax.contrib.muon(1e-3), one),
        "galore at 512": update(lrjax.galore(1e-3, 64), {"layer": (512, 512)}),
        "adam at 2048": update(optax.adam(1e-3), large),
        "subspace_adam at 2048": update(lrjax.subspace_adam(1e-3, 256), large),
    }
    layouts = {
        "of 8 layers": (leaves, None),
        "by rows": (tall, P("x", None)),
        "by columns": (tall, P(None, "x")),
        "by layer": (stack, P("x")),
    }
    sharded = {
        f"{name} {layout}": update(optimizer(name), *shapes)
        for name in ("adam", "subspace_adam", "galore", "dion", "soap")
        for layout, shapes in layouts.items()
    }
    return {**steps, **parts, **sharded}
