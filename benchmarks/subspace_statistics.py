"""What do statistics of subspaces say of a training run, and may they be believed?

Three answers. Error bars: how far samples turn a subspace of principal components, measured
over 400 draws beside the expansion of ``linalg.subspace_error``, for three spectra and
heavy tails. The tiny subspace: how much of the gradient of a small classifier of digits
lies in the top eigenspace of its Hessian, as wide as there are classes, and where training
ends that goes on within it alone, outside of it alone, and freely. The past: what training
in the principal components of the first part of a run reaches, from the start, beside
random directions and the whole run.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _harness import bound, write_results
from sklearn.datasets import load_digits

import lrjax


DRAWS = 400
SPECTRA = {
    "halves": (2.0 ** -np.arange(20.0), 3),
    "spikes": (np.r_[np.full(3, 5.0), np.ones(27)], 3),
    "power law": (1 / np.arange(1.0, 51.0), 5),
}
SAMPLES = (30, 100, 300, 1000, 3000)
HEAVY = 10  # degrees of freedom of a multivariate t: its kurtosis is 3 · 8 / 6 = 4

SEEDS, TEST, BATCH, CLASSES, RATE = 5, 450, 64, 10, 0.2
WARM, STEPS, HESSIAN, LANCZOS = 200, 120, 300, 40  # images that the Hessian is taken of
MARKS = (0, 10, 25, 50, 100, WARM - 1)
DIMS = np.array([5, 10, 20, 40])
RUN, EARLY, EVERY, NEWTON = 1000, 100, 2, 60  # steps, those that are recorded, L-BFGS steps


# Error bars ------------------------------------------------------------------------------


def turned(values, rank, samples, heavy, key):
    """``‖P̂ − P‖²`` of one draw, and what is predicted from its own eigenvalues."""
    k_normal, k_scale = jr.split(key)
    x = jr.normal(k_normal, (samples, len(values))) * jnp.sqrt(values)[None]
    if heavy:  # a multivariate t, scaled to the same covariance
        scale = jr.chisquare(k_scale, HEAVY, (samples, 1))
        x = x * jnp.sqrt((HEAVY - 2) / scale)
    found, vectors = jnp.linalg.eigh(x.T @ x / samples)
    square = 2 * (rank - jnp.sum(vectors[:rank, -rank:] ** 2))
    return square, lrjax.linalg.subspace_error(found[::-1], rank, samples).square


def error_bars():
    """A row for each spectrum and number of samples, and the worst trusted one."""
    rows, worst, heavy_ratio = [], 0.0, 0.0
    cases = [(name, n, False) for name in SPECTRA for n in SAMPLES]
    for name, n, heavy in [*cases, ("spikes", 1000, True)]:
        values, rank = SPECTRA[name]
        run = jax.jit(
            lambda keys, v=values, r=rank, n=n, h=heavy: jax.lax.map(
                lambda key: turned(jnp.asarray(v, jnp.float32), r, n, h, key),
                keys,
                batch_size=25,
            )
        )
        squares, own = map(np.asarray, run(jr.split(jr.key(n), DRAWS)))
        kurtosis = 3 * (HEAVY - 2) / (HEAVY - 4) if heavy else 3.0
        told = lrjax.linalg.subspace_error(jnp.asarray(values), rank, n, kurtosis=kurtosis)
        ratio = float(told.square) / float(squares.mean())
        rows.append(
            {
                "spectrum": name + (", heavy tails" if heavy else ""),
                "samples": n,
                "measured": float(squares.mean()),
                "standard error": float(squares.std() / DRAWS**0.5),
                "predicted over measured": ratio,
                "from the sample's own spectrum": float(np.median(own) / squares.mean()),
                "trusted": bool(told.trusted),
            }
        )
        if heavy:
            heavy_ratio = abs(ratio - 1)
        elif told.trusted:
            worst = max(worst, abs(ratio - 1))
    # Within a tenth is what ``subspace_error`` promises where it says ``trusted``.
    bounds = [
        bound(
            "error bars where trusted: predicted over measured, off one", worst, at_most=0.1
        ),
        bound(
            "error bars of heavy tails by their kurtosis, off one", heavy_ratio, at_most=0.1
        ),
    ]
    return rows, bounds


# A small classifier of digits ------------------------------------------------------------


def digits(key):
    """Images with numbers in [0, 1] and labels: to learn from and to test."""
    images, labels = load_digits(return_X_y=True)
    order = jr.permutation(key, len(labels))
    images = jnp.asarray(images / 16, jnp.float32)[order]
    labels = jnp.asarray(labels)[order]
    return (images[TEST:], labels[TEST:]), (images[:TEST], labels[:TEST])


def network(key):
    """2,410 parameters 64-32-10 at the start, and what makes a model of any."""
    return eqx.partition(eqx.nn.MLP(64, 10, 32, 1, jnp.tanh, key=key), eqx.is_array)


def loss(params, static, images, labels):
    """The mean cross entropy."""
    logits = jax.vmap(eqx.combine(params, static))(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(params, static, images, labels):
    """The share of right answers."""
    return jnp.mean(jnp.argmax(jax.vmap(eqx.combine(params, static))(images), -1) == labels)


def sgd(params, static, data, keys, project=lambda params, grads, key: (grads, None)):
    """Plain steps with projected gradients, and what the projection notes of each."""

    def step(params, key):
        k_batch, k_space = jr.split(key)
        batch = jr.randint(k_batch, (BATCH,), 0, len(data[1]))
        grads = jax.grad(loss)(params, static, data[0][batch], data[1][batch])
        grads, seen = project(params, grads, k_space)
        return jax.tree.map(lambda p, g: p - RATE * g, params, grads), (params, seen)

    return jax.lax.scan(step, params, keys)


def tiny_subspace(data, key):
    """The share of the gradient in the top space over training, and three ways on."""
    train = data[0]
    k_init, k_warm, k_rest = jr.split(key, 3)
    params, static = network(k_init)
    few = (train[0][:HESSIAN], train[1][:HESSIAN])

    def space(params, key):
        return lrjax.metrics.hessian_space(
            loss, params, static, *few, k=CLASSES, key=key, steps=LANCZOS
        )

    warm, (path, _) = sgd(params, static, train, jr.split(k_warm, WARM))

    def look(params):
        found = space(params, key)
        return found, found.share(jax.grad(loss)(params, static, *few))

    # One after the other: a program for each would take six times as long to compile.
    marked = jax.tree.map(lambda x: x[np.array(MARKS)], path)
    spaces, shares = jax.lax.map(look, marked)
    last = jax.tree.map(lambda x: x[-1], spaces)
    kept = jax.vmap(lambda found: found.overlap(last))(spaces)
    ways = {
        "free": lambda params, grads, key: (grads, None),
        "dominant": lambda params, grads, key: (space(params, key).project(grads), None),
        "bulk": lambda params, grads, key: (space(params, key).project_out(grads), None),
    }
    keys = jr.split(k_rest, STEPS)
    ends = {
        name: loss(sgd(warm, static, train, keys, way)[0], static, *train)
        for name, way in ways.items()
    }
    return shares, kept, spaces.residuals, loss(warm, static, *train), ends


def gradient_overlap(data):
    """Shares over training, and the losses reached within the space and outside of it."""
    keys = jr.split(jr.key(1), SEEDS)
    run = jax.jit(lambda key: tiny_subspace(data, key))
    found = [jax.tree.map(np.asarray, run(key)) for key in keys]
    shares, kept, residual, before, ends = jax.tree.map(lambda *x: np.stack(x), *found)
    rows = [
        {
            "step": step,
            "share of the gradient": float(shares[:, i].mean()),
            "spread": float(shares[:, i].std(ddof=1)),
            "overlap with the space at the end": float(kept[:, i].mean()),
        }
        for i, step in enumerate(MARKS)
    ]
    rows.append({"loss after": WARM, "mean": float(before.mean())})
    rows += [
        {
            "training goes on": name,
            "loss reached": float(x.mean()),
            "spread": float(x.std(ddof=1)),
        }
        for name, x in ends.items()
    ]
    rows.append({"largest residual of an eigenpair": float(residual.max())})
    gain = {name: (before - x).mean() for name, x in ends.items()}
    # Most of the gradient, and less than half of the work: the other half does most of it.
    bounds = [
        bound("share of the gradient in the top space", shares[:, -1].mean(), at_least=0.5),
        bound(
            "training in the dominant space: gain over that of all",
            gain["dominant"] / gain["free"],
            at_most=0.5,
        ),
        bound(
            "training in the bulk: gain over that of all",
            gain["bulk"] / gain["free"],
            at_least=0.5,
        ),
    ]
    return rows, bounds


# The past of a run -----------------------------------------------------------------------


def in_subspace(subspace, static, data):
    """Test accuracies of L-BFGS on the first d numbers of a subspace, ``(dims,)``."""
    train, test = data

    def one(d):
        used = jnp.arange(subspace.dim) < d
        of = lambda x: loss(subspace(jnp.where(used, x, 0)), static, *train)
        tx = optax.lbfgs()
        value_and_grad = optax.value_and_grad_from_state(of)

        def step(carry, _):
            x, state = carry
            value, grad = value_and_grad(x, state=state)
            updates, state = tx.update(grad, state, x, value=value, grad=grad, value_fn=of)
            return (x + updates, state), None

        x = jnp.zeros(subspace.dim)
        (x, _), _ = jax.lax.scan(step, (x, tx.init(x)), None, NEWTON)
        return accuracy(subspace(jnp.where(used, x, 0)), static, *test)

    return jax.lax.map(one, jnp.asarray(DIMS))


def from_the_past(data, key):
    """Accuracies in the run's own directions and in random ones, and of the run."""
    train, test = data
    k_init, k_run, k_random = jr.split(key, 3)
    params, static = network(k_init)
    end, (path, _) = sgd(params, static, train, jr.split(k_run, RUN))
    early = jax.tree.map(lambda x: x[:EARLY:EVERY], path)
    most = int(DIMS[-1])
    own = lrjax.trajectory_subspace(early, most, start=params)
    random = lrjax.random_subspace(params, most, kind="dense", key=k_random)
    at = jax.tree.map(lambda x: x[EARLY], path)
    whole = tuple(accuracy(x, static, *test) for x in (at, end))
    return in_subspace(own, static, data), in_subspace(random, static, data), whole


def past(data):
    """A row for each number of directions."""
    run = jax.jit(lambda key: from_the_past(data, key))
    found = [jax.tree.map(np.asarray, run(key)) for key in jr.split(jr.key(2), SEEDS)]
    own, random, (early, end) = jax.tree.map(lambda *x: np.stack(x), *found)
    rows = [
        {
            "directions": int(d),
            "of the run": float(own[:, i].mean()),
            "spread": float(own[:, i].std(ddof=1)),
            "random": float(random[:, i].mean()),
        }
        for i, d in enumerate(DIMS)
    ]
    rows.append({"whole run, where recording ends": float(early.mean())})
    rows.append({"whole run, at its end": float(end.mean())})
    # As good as the whole run is: within two standard errors of a test with 450 images.
    error = float((end.mean() * (1 - end.mean()) / TEST) ** 0.5)
    bounds = [
        bound(
            "accuracy with 40 directions of the run less that of the whole run",
            own[:, -1].mean() - end.mean(),
            at_least=-2 * error,
        ),
        bound(
            "accuracy with 40 directions of the run less that where their recording ends",
            own[:, -1].mean() - early.mean(),
            at_least=0.0,
        ),
        bound(
            "accuracy with 5 directions of the run less that with 40 random ones",
            own[:, 0].mean() - random[:, -1].mean(),
            at_least=0.0,
        ),
    ]
    return rows, bounds


def main():
    """Three tables and their bounds."""
    data = digits(jr.key(0))
    rows, bounds = [], []
    for more_rows, more_bounds in (error_bars(), gradient_overlap(data), past(data)):
        rows += more_rows
        bounds += more_bounds
    write_results("subspace_statistics", rows, bounds, "scikit-learn")


if __name__ == "__main__":
    main()
