import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

import lrjax


def tol(*arrays, condition=1.0):
    """Tolerance of direct linear algebra: 50 rounding errors times the condition."""
    eps = max(float(jnp.finfo(a.dtype).eps) for a in arrays)
    return 50 * eps * condition


def relative_error(got, want):
    """``‖got − want‖ / ‖want‖`` in float64, or ``‖got‖`` where ``want`` is zero."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    size = np.linalg.norm(want)
    return np.linalg.norm(got - want) / (size if size else 1.0)


def assert_close(got, want, *, rtol=None, condition=1.0):
    """Assert that two trees agree in structure, shape and value (relative Frobenius)."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jtu.tree_flatten_with_path(got)[0], jax.tree.leaves(want), strict=True
    ):
        a, b = jnp.asarray(a), jnp.asarray(b)
        where = jtu.keystr(path)
        assert a.shape == b.shape, f"{where}: {a.shape} != {b.shape}"
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            np.testing.assert_array_equal(a, b, err_msg=where)
            continue
        bound = tol(a, b, condition=condition) if rtol is None else rtol
        error = relative_error(a, b)
        assert error <= bound, f"{where}: relative error {error:.2e} > {bound:.2e}"


def all_finite(tree):
    """Whether every number of a tree is finite."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return all(np.all(np.isfinite(np.asarray(x))) for x in leaves)


@functools.partial(jax.jit, static_argnames=("m", "n", "r", "batch", "dtype"))
def random_low_rank(key, m, n, r, *, batch=(), dtype=jnp.float32):
    """A LowRank with standard normal factors."""
    kl, kr = jr.split(key)
    left = jr.normal(kl, (*batch, m, r), dtype)
    right = jr.normal(kr, (*batch, n, r), dtype)
    return lrjax.LowRank(left, right)


def split_factors(tree, side):
    """The tree with one factor of each node, and the other half with the other ones."""

    def marks(x):
        if not lrjax.is_low_rank(x):
            return True
        return eqx.tree_at(
            lambda n: (n.left, n.right), x, (side == "left", side == "right")
        )

    return eqx.partition(tree, jax.tree.map(marks, tree, is_leaf=lrjax.is_low_rank))


def with_spectrum(key, m, n, values, dtype=jnp.float32):
    """A matrix ``(m, n)`` with random singular vectors and the given singular values."""
    return _with_spectrum(key, m, n, jnp.asarray(values, dtype))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _with_spectrum(key, m, n, values):
    kl, kr = jr.split(key)
    u = jnp.linalg.qr(jr.normal(kl, (m, len(values)), values.dtype))[0]
    v = jnp.linalg.qr(jr.normal(kr, (n, len(values)), values.dtype))[0]
    return (u * values[None]) @ v.T
