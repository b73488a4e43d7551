"""What does a head lose that sees its classes one after the other, in float32?

Digits of scikit-learn behind a fixed layer of random ReLU features, as of a frozen network.
Batches of 16 arrive sorted by class, and classes are added when they appear. The weight is
compared with ridge regression on all images at once in float64; so is that of the textbook
recursion on the inverse ``R``, in float32 too, and the accuracy on images never seen.
"""

import functools
import time

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from _harness import bound, interleaved, median_ratio, medians, write_results
from sklearn.datasets import load_digits

from lrjax.continual import RecursiveLeastSquares


FEATURES, BATCH, RIDGES = 256, 16, (1e-1, 1e-2, 1e-3)


def digits():
    """Features and labels, sorted by class, of the training and of the test images."""
    x, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    lift = jr.normal(jr.key(0), (64, FEATURES)) / 8
    features = np.asarray(jax.nn.relu(jnp.asarray(x / 16, jnp.float32) @ lift))
    train, test = order[:1440], order[1440:]
    train = train[np.argsort(labels[train], kind="stable")]
    return (features[train], labels[train]), (features[test], labels[test])


@jax.jit
def inverse_step(state, x, y):
    """One batch of the recursion on the inverse."""
    inverse, weight = state
    seen = jnp.eye(len(x)) + x @ inverse @ x.T
    inverse = inverse - inverse @ x.T @ jnp.linalg.solve(seen, x @ inverse)
    return inverse, weight + inverse @ x.T @ (y - x @ weight)


root_step = jax.jit(RecursiveLeastSquares.update)


def fitted(x, labels, ridge):
    """The weights of both, where classes are added as they appear."""
    head = RecursiveLeastSquares.start(FEATURES, 1, ridge=ridge)
    state = jnp.eye(FEATURES) / ridge, jnp.zeros((FEATURES, 10))
    for rows in np.split(np.arange(len(x)), len(x) // BATCH):
        classes = max(head.target.shape[1], int(labels[rows].max()) + 1)
        y = np.eye(10, dtype=np.float32)[labels[rows]]
        head = root_step(head.with_outputs(classes), x[rows], y[:, :classes])
        state = inverse_step(state, x[rows], y)
    return np.asarray(head.weight()), np.asarray(state[1].T)


def main():
    (x, labels), (x_test, labels_test) = digits()
    wide, targets = x.astype(np.float64), np.eye(10)[labels]
    accuracy = lambda w: float(np.mean(np.argmax(x_test @ w.T, 1) == labels_test))
    rows, errors = [], {}
    for ridge in RIDGES:
        gram = wide.T @ wide + ridge * np.eye(FEATURES)
        joint = np.linalg.solve(gram, wide.T @ targets).T
        away = lambda w, joint=joint: float(
            np.linalg.norm(w - joint) / np.linalg.norm(joint)
        )
        root, inverse = fitted(x, labels, ridge)
        errors[ridge] = away(root), away(inverse)
        rows.append(
            {
                "ridge": ridge,
                "condition": float(np.linalg.cond(gram)),
                "error_root": errors[ridge][0],
                "error_inverse": errors[ridge][1],
                "accuracy_joint": accuracy(joint),
                "accuracy_root": accuracy(root),
                "accuracy_inverse": accuracy(inverse),
            }
        )
    batch = x[:BATCH], np.eye(10, dtype=np.float32)[labels[:BATCH]]
    head = RecursiveLeastSquares.start(FEATURES, 10)
    state = jnp.eye(FEATURES), jnp.zeros((FEATURES, 10))
    seconds = interleaved(
        {
            "root": functools.partial(root_step, head, *batch),
            "inverse": functools.partial(inverse_step, state, *batch),
        },
        repeats=100,
        clock=time.process_time,
    )
    rows.append({f"{name}_seconds": s for name, s in medians(seconds).items()})
    worst = max(row["accuracy_joint"] - row["accuracy_root"] for row in rows[:-1])
    bounds = [
        bound("accuracy lost to a fit of all at once", worst, at_most=0.0),
        bound("error of the weight, ridge 1e-2", errors[1e-2][0], at_most=1e-4),
        bound(
            "error of the recursion on the inverse over that of the head, ridge 1e-2",
            errors[1e-2][1] / errors[1e-2][0],
            at_least=10,
        ),
        bound(
            "time of a batch over the recursion on the inverse",
            median_ratio(seconds, "root", "inverse"),
            at_most=5,
        ),
    ]
    write_results("incremental_head", rows, bounds)


if __name__ == "__main__":
    main()
