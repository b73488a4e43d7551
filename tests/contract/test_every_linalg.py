"""What every function of ``lrjax.linalg`` has to stand: dtypes, batches, degenerate input.

A row of the table is a call and what is true of its result. All rows are run in the same
way, so that a function enters the contract with one line. 64-bit types are on throughout:
a float32 that is promoted by mistake shows.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax import linalg


pytestmark = pytest.mark.usefixtures("x64")

M, N, R = 7, 5, 3
WIDER, SAME = "float32 or wider", "the dtype of the input"


class Row(NamedTuple):
    """One call.

    Attributes:
        call: of the arrays.
        takes: their kinds, names of ``KINDS``.
        error: of the arrays and the result, in NumPy and float64: what should vanish, a
            relative error.
        half: what the result is in for bfloat16: ``WIDER`` or ``SAME``.
        singular: whether zero and rank-deficient input have finite results.
        exact: whether ``error`` is of rounding size, or 0.1 at most.
    """

    call: Callable[..., Any]
    takes: tuple[str, ...]
    error: Callable[..., Any]
    half: str = WIDER
    singular: bool = True
    exact: bool = True


def spectral(rng, m, n):
    """Singular values of 1, 0.8, …: vectors are then determined to rounding."""
    k = min(m, n)
    orth = lambda size: np.linalg.qr(rng.standard_normal((size, k)))[0]
    return (orth(m) * np.linspace(1.0, 0.2, k)) @ orth(n).T


def of_rank_one(x):
    return x[:, :1] @ x[:1]


def psd_of_rank_one(x):
    return x[:, :1] @ x[:1] / x[0, 0]


def one_entry(x):
    return np.where(np.arange(len(x)) == 0, x, 0)


# A generic one of each kind, and what makes it of rank one.
KINDS = {
    "matrix": (lambda rng: spectral(rng, M, N), of_rank_one),
    "wide": (lambda rng: spectral(rng, N, M), of_rank_one),
    "square": (lambda rng: spectral(rng, N, N), of_rank_one),
    "thin": (lambda rng: spectral(rng, M, R), of_rank_one),
    "columns": (lambda rng: spectral(rng, N, R), of_rank_one),
    "core": (lambda rng: spectral(rng, R, R), of_rank_one),
    "psd": (
        lambda rng: (lambda x: x.T @ x)(spectral(rng, N, N)),
        psd_of_rank_one,
    ),
    "left_psd": (
        lambda rng: (lambda x: x.T @ x)(spectral(rng, M, M)),
        psd_of_rank_one,
    ),
    "mild_psd": (
        lambda rng: (lambda x: x.T @ x + np.eye(N))(spectral(rng, N, N)),
        psd_of_rank_one,
    ),
    "values": (lambda rng: np.sort(rng.random(N))[::-1], one_entry),
    "vector": (lambda rng: rng.standard_normal(8), one_entry),
}


def norm(x):
    return np.linalg.norm(np.ravel(x))


def off(found, wanted):
    """The relative difference."""
    return norm(found - wanted) / norm(wanted)


def orthonormal(q):
    return norm(q.T @ q - np.eye(q.shape[-1]))


def svd_error(x, u, values, v):
    rank = values.shape[-1]
    exact = np.linalg.svd(x, compute_uv=False)[:rank]
    return np.maximum(off((u.T @ x @ v), np.diag(exact)), off(values, exact))


def inverse_error(x, inverse):
    return norm(x.T @ x @ inverse - np.eye(x.shape[-1]))


def whitened_error(x, root):
    return orthonormal(x @ root)


def angle_error(x, y, angles):
    q = [np.linalg.qr(a)[0] for a in (x, y)]
    return off(np.cos(angles), np.linalg.svd(q[0].T @ q[1], compute_uv=False))


def turned_cosines(direction):
    """Of the angles by which the first columns turn along a direction."""
    return np.cos(np.linalg.svd(direction[R:], compute_uv=False))


def span_error(x, basis):
    """Leading right singular vectors, near which a few steps come."""
    v = np.linalg.svd(x)[2][: basis.shape[-1]].T
    return off(basis @ (basis.T @ v), v)


def hadamard(n):
    """The matrix of signs of Sylvester."""
    if n == 1:
        return np.ones((1, 1))
    return np.kron([[1, 1], [1, -1]], hadamard(n // 2))


def weighted_error(d, c_left, c_right, found):
    """The residual weighed is that of the best approximation of the weighed matrix."""
    root = lambda c: (lambda s, q: (q * np.sqrt(s)[None]) @ q.T)(*np.linalg.eigh(c))
    left, right = root(c_left), root(c_right)
    x = (found.left * found.values[None]) @ found.right.T
    tail = np.linalg.svd(left @ d @ right, compute_uv=False)[found.values.shape[-1] :]
    return np.abs(
        off(left @ x @ right, left @ d @ right) - norm(tail) / norm(left @ d @ right)
    )


def nystrom_error(c, found):
    """Of the guess below C that agrees with it on the first columns."""
    values, vectors = found
    want = c[:, :R] @ np.linalg.inv(c[:R, :R]) @ c[:R]
    return off((vectors * values[None]) @ vectors.T, want)


def products(c):
    """The operator of a matrix, in its working dtype, and the shape of its vectors."""
    c = c.astype(linalg.working_dtype(c.dtype))
    return lambda x: linalg.times(c, x[:, None])[:, 0], c[0]


def from_eigen(values, left, right=None):
    right = left if right is None else right
    return linalg.outer(linalg.times(left, jnp.diag(values)), right)


LAST = (np.arange(M) == M - 1)[:, None]


def near(x, y):
    """A matrix whose columns do not span quite what those of ``x`` do, without rounding."""
    return x * ~LAST + y * LAST


def projector_and_cost(average, x, y):
    """Of three subspaces, two of them near each other: signs of vectors are left out."""
    found = average(jnp.stack([x, near(x, y), x]))
    return found.basis @ found.basis.T, found.cost


def mean_error(x, y, out):
    q = [np.linalg.qr(a)[0] for a in (x, near(x, y), x)]
    values, vectors = np.linalg.eigh(sum(a @ a.T for a in q))
    top = vectors[:, -R:]
    return off(out[0], top @ top.T) + np.abs(out[1] - (3 * R - np.sum(values[-R:])))


def median_error(x, y, out):
    """Where two of three are one, that is the median, but for the floor of its weights."""
    q, other = np.linalg.qr(x)[0], np.linalg.qr(near(x, y))[0]
    away = np.sqrt(R - norm(q.T @ other) ** 2)
    floor = 1e-6 * R**0.5
    wrong = np.maximum(off(out[0], q @ q.T) - floor, 0)
    return wrong + np.maximum(np.abs(out[1] - away) - 4 * floor, 0)


KEY = jr.key(0)
svd_row = lambda call, **kw: Row(
    call, ("matrix",), lambda x, out: svd_error(x, out.left, out.values, out.right), **kw
)
polar_error = lambda x, q: off(
    q, (lambda u, s, v: u @ v)(*np.linalg.svd(x, full_matrices=False))
)

TABLE = {
    "times": Row(linalg.times, ("matrix", "square"), lambda x, y, z: off(z, x @ y), SAME),
    "cross": Row(linalg.cross, ("matrix", "thin"), lambda x, y, z: off(z, x.T @ y), SAME),
    "outer": Row(linalg.outer, ("matrix", "square"), lambda x, y, z: off(z, x @ y.T), SAME),
    "gram": Row(linalg.gram, ("matrix",), lambda x, g: off(g, x.T @ x)),
    "identity_like": Row(
        linalg.identity_like, ("square",), lambda x, i: off(x @ i, x), SAME
    ),
    "nonzero": Row(linalg.nonzero, ("values",), lambda x, y: off(y, x), SAME),
    "unit_columns": Row(
        linalg.unit_columns,
        ("matrix",),
        lambda x, u: off(u * np.sqrt(np.sum(x**2, 0, keepdims=True)), x),
        SAME,
    ),
    "svd": Row(
        linalg.svd,
        ("matrix",),
        lambda x, out: svd_error(x, out[0], out[1], out[2].T),
    ),
    "singular_values": Row(
        linalg.singular_values,
        ("matrix",),
        lambda x, s: off(s, np.linalg.svd(x, compute_uv=False)),
    ),
    "map_singular_values": Row(
        lambda x: linalg.map_singular_values(lambda values: values**3, x),
        ("matrix",),
        lambda x, y: off(y, x @ x.T @ x),
        SAME,
    ),
    "energy_mask": Row(
        lambda values: linalg.energy_mask(values, 0.9),
        ("values",),
        lambda values, kept: np.abs(
            np.sum(kept) - np.sum(np.cumsum(values**2) < 0.9 * np.sum(values**2)) - 1
        ),
    ),
    "penalized_rank": Row(
        lambda values: linalg.penalized_rank(values, (N, M), 0.01),
        ("values",),
        lambda values, rank: np.abs(rank - np.sum(values**2 > 0.02 * (N + M))),
    ),
    "eigh": Row(
        linalg.eigh,
        ("psd",),
        lambda x, out: off((out[1] * out[0][None]) @ out[1].T, x) + orthonormal(out[1]),
    ),
    "cholesky": Row(
        linalg.cholesky,
        ("psd",),
        lambda x, c: off(np.tril(c) @ np.tril(c).T, x),
        singular=False,
    ),
    "inverse_gram": Row(linalg.inverse_gram, ("thin",), inverse_error),
    "inverse_grams": Row(
        linalg.inverse_grams,
        ("thin", "columns"),
        lambda x, y, out: inverse_error(x, out[0]) + inverse_error(y, out[1]),
    ),
    "inverse_root_gram": Row(linalg.inverse_root_gram, ("thin",), whitened_error),
    "inverse_root_grams": Row(
        linalg.inverse_root_grams,
        ("thin", "columns"),
        lambda x, y, out: whitened_error(x, out[0]) + whitened_error(y, out[1]),
    ),
    "orthonormalizers": Row(
        lambda x: linalg.orthonormalizers(x)[0],
        ("thin",),
        lambda x, out: whitened_error(x, out[0]) + off(out[1], out[0].T),
    ),
    "together": Row(
        lambda x, y: linalg.together(linalg.gram, [x, y, x]),
        ("thin", "columns"),
        lambda x, y, out: off(out[0], x.T @ x) + off(out[1], y.T @ y),
    ),
    "orthonormalize": Row(
        linalg.orthonormalize,
        ("thin",),
        lambda x, q: orthonormal(q) + off(q @ (q.T @ x), x),
        SAME,
    ),
    "orthonormalize(cholesky)": Row(
        functools.partial(linalg.orthonormalize, method="cholesky"),
        ("thin",),
        lambda x, q: orthonormal(q) + off(q @ (q.T @ x), x),
        SAME,
    ),
    "extend_basis": Row(
        lambda d: linalg.extend_basis(jnp.eye(M, 2, dtype=d.dtype), d),
        ("thin",),
        lambda d, q: orthonormal(q) + off(q @ (q.T @ d), d) + norm(q[2:, :2]),
        SAME,
    ),
    "geodesic": Row(
        lambda d: linalg.geodesic(jnp.eye(M, R, dtype=d.dtype), d),
        ("thin",),
        lambda d, q: (
            orthonormal(q)
            + off(np.linalg.svd(q[:R], compute_uv=False)[::-1], turned_cosines(d))
        ),
    ),
    "polar": Row(linalg.polar, ("matrix",), polar_error, SAME),
    **{
        f"polar({method})": Row(
            functools.partial(linalg.polar, method=method),
            ("matrix",),
            polar_error,
            SAME,
            exact=method == "gram",
        )
        for method in ("gram", "cubic", "polar_express")
    },
    "procrustes": Row(linalg.procrustes, ("square",), polar_error),
    "principal_angles": Row(linalg.principal_angles, ("thin", "thin"), angle_error),
    "truncated_svd": svd_row(lambda x: linalg.truncated_svd(x, R)),
    "truncated_svd(randomized)": svd_row(
        lambda x: linalg.truncated_svd(x, R, method="randomized", key=KEY)
    ),
    "truncated_svd(power)": svd_row(
        lambda x: linalg.truncated_svd(x, R, method="power", power_iters=6, key=KEY),
        exact=False,
    ),
    "product_svd": Row(
        lambda left, core, right: linalg.product_svd(left, core, right, R),
        ("thin", "core", "columns"),
        lambda left, core, right, out: svd_error(
            left @ core @ right.T, out.left, out.values, out.right
        ),
    ),
    "weighted_svd": Row(
        lambda d, c_left, c_right: linalg.weighted_svd(d, c_left, c_right, R),
        ("matrix", "left_psd", "psd"),
        weighted_error,
    ),
    "subspace_iteration": Row(
        lambda x, start: linalg.subspace_iteration(
            lambda v: linalg.times(x, v), lambda u: linalg.cross(x, u), start, steps=8
        ),
        ("matrix", "columns"),
        lambda x, start, basis: span_error(x, basis) + orthonormal(basis),
        SAME,
        exact=False,
    ),
    "nystrom": Row(
        lambda c: linalg.nystrom(c[:, :R], jnp.eye(N, R, dtype=c.dtype)),
        ("psd",),
        nystrom_error,
    ),
    "nystrom_sketch": Row(
        lambda c: from_eigen(*linalg.nystrom_sketch(*products(c), N, key=KEY)),
        ("psd",),
        lambda c, out: off(out, c),
    ),
    "nystrom_preconditioner": Row(
        lambda c: (lambda p: p.as_matrix() @ p.inverse().as_matrix())(
            linalg.nystrom_preconditioner(*products(c), R, key=KEY)
        ),
        ("mild_psd",),
        lambda c, p: norm(p - np.eye(N)),
    ),
    "tall_inner": Row(
        lambda x, y: linalg.tall_inner([x, x], [y[:, 0], y[:, 0]]),
        ("thin", "thin"),
        lambda x, y, c: off(c, 2 * x.T @ y[:, 0]),
        SAME,
    ),
    "tall_gram": Row(
        lambda x, y: linalg.tall_gram([x, x], [y, y]),
        ("thin", "matrix"),
        lambda x, y, g: off(g, 2 * x.T @ y),
        SAME,
    ),
    "tall_apply": Row(
        lambda x, y: linalg.tall_apply([x], y[0]),
        ("thin", "core"),
        lambda x, y, out: off(out[0], x @ y[0]),
        SAME,
    ),
    "tall_mix": Row(
        lambda x, y: linalg.tall_mix([x, x], y),
        ("thin", "core"),
        lambda x, y, out: off(out[1], x @ y),
        SAME,
    ),
    "tall_svd": Row(
        lambda x: (
            lambda u, values, vt: (from_eigen(values, jnp.concatenate(u), vt.T), values)
        )(*linalg.tall_svd([x[:3], x[3:]])),
        ("thin",),
        lambda x, out: off(out[0], x) + off(out[1], np.linalg.svd(x, compute_uv=False)),
    ),
    "LowRankPlusDiagonal": Row(
        lambda x, y: (
            linalg.LowRankPlusDiagonal(x, jnp.ones(R, x.dtype), 1.0).inverse().mv(y[:, 0])
        ),
        ("thin", "thin"),
        lambda x, y, z: off(z + x @ (x.T @ z), y[:, 0]),
    ),
    "pca_split_rotation": Row(
        lambda c: linalg.pca_split_rotation(c, R, key=KEY),
        ("psd",),
        lambda c, q: orthonormal(q) + norm((q.T @ c @ q)[:R, R:]),
    ),
    "pivoted_columns": Row(
        lambda x: linalg.pivoted_columns(x, R),
        ("matrix",),
        lambda x, index: np.abs(index[0] - np.argmax(np.sum(x**2, 0))),
    ),
    "sqrtm": Row(linalg.sqrtm, ("mild_psd",), lambda a, s: off(s @ s, a), SAME),
    "inverse_sqrtm": Row(
        linalg.inverse_sqrtm,
        ("mild_psd",),
        lambda a, k: norm(k @ a @ k - np.eye(N)),
        SAME,
    ),
    "optimal_shrinkage": Row(
        lambda s: linalg.optimal_shrinkage(s, (N, M), noise=0.05),
        ("values",),
        lambda s, out: np.sum((out < 0) | (out > s)),
        SAME,
    ),
    "hard_threshold": Row(
        lambda x: linalg.hard_threshold(x, 0.25),
        ("matrix",),
        lambda x, y: off(y, np.where(np.abs(x) > 0.25, x, 0)),
        SAME,
    ),
    "soft_threshold": Row(
        lambda x: linalg.soft_threshold(x, 0.2),
        ("matrix",),
        lambda x, y: off(x - y, np.clip(x, -0.2, 0.2)),
        SAME,
    ),
    "firm_threshold": Row(
        lambda x: linalg.firm_threshold(x, 0.1, 0.3),
        ("matrix",),
        lambda x, y: off(
            y,
            np.where(
                np.abs(x) < 0.3,
                x - np.clip(x, -0.1, 0.1) + (x - 0.1 * np.sign(x)) / 2 * (np.abs(x) > 0.1),
                x,
            ),
        ),
        SAME,
    ),
    "lq_threshold": Row(
        lambda x: linalg.lq_threshold(x, 0.02, 0.5),
        ("matrix",),
        # Where it is not zero it is a stationary point.
        lambda x, y: off(
            np.where(y != 0, np.abs(y) + 0.01 / np.sqrt(np.abs(y) + (y == 0)), 0),
            np.where(y != 0, np.abs(x), 0),
        ),
        SAME,
    ),
    "leverage_scores": Row(
        linalg.leverage_scores,
        ("thin",),
        lambda x, t: np.abs(np.sum(t) - R) / R,
    ),
    "lewis_weights": Row(
        lambda x: linalg.lewis_weights(x, 1.0, steps=60),
        ("thin",),
        lambda x, w: np.abs(np.sum(w) - R) / R,
    ),
    "lp_sensitivities": Row(
        lambda x: jax.vmap(lambda x: linalg.lp_sensitivities(x, 2.0))(
            x.reshape(-1, *x.shape[-2:])
        ).lower.reshape(x.shape[:-1]),
        ("thin",),
        lambda x, low: off(low, np.sum(np.linalg.qr(x)[0] ** 2, 1)),
    ),
    "sample_rows": Row(
        lambda x: linalg.sample_rows(x, 6, key=jr.key(0)).weights,
        ("values",),
        lambda x, weights: np.abs(np.min(weights) * 6 * np.max(x) / np.sum(x) - 1),
        exact=False,
    ),
    "keep_largest": Row(
        lambda x: linalg.keep_largest(x, 0.5),
        ("matrix",),
        lambda x, y: np.where(
            np.sum(y != 0, 1).max() <= N // 2, off(np.where(y != 0, x, 0), y), 1
        ),
        SAME,
    ),
    "order_statistic": Row(
        lambda s: linalg.order_statistic(s, jnp.asarray(2), axis=0),
        ("values",),
        lambda s, x: off(x.ravel(), s[1:2]),
        SAME,
    ),
    **{
        name: Row(
            functools.partial(projector_and_cost, getattr(linalg, name)),
            ("thin", "thin"),
            wanted,
        )
        for name, wanted in (
            ("subspace_mean", mean_error),
            ("subspace_median", median_error),
        )
    },
    "subspace_difference": Row(
        lambda x, y: linalg.subspace_difference(x, near(x, y)).angles,
        ("thin", "thin"),
        lambda x, y, angles: angle_error(x, near(x, y), angles[::-1]),
    ),
    "subspace_acceleration": Row(  # there and back again: from the start to the turn
        lambda x, y: linalg.subspace_acceleration(x, near(x, y), x).angles,
        ("thin", "thin"),
        lambda x, y, angles: angle_error(x, near(x, y), angles[::-1]),
    ),
    "subspace_overlap": Row(
        lambda x, y: linalg.subspace_overlap(x, y),
        ("thin", "thin"),
        lambda x, y, share: off(
            share, norm(np.linalg.qr(x)[0].T @ np.linalg.qr(y)[0]) ** 2 / R
        ),
    ),
    "subspace_error": Row(
        lambda values: linalg.subspace_error(values.at[0].set(2), 1, 9).square,
        ("values",),
        lambda v, square: off(square, 2 / 9 * np.sum(2 * v[1:] / (2 - v[1:]) ** 2)),
    ),
    "walsh_hadamard": Row(
        linalg.walsh_hadamard,
        ("vector",),
        lambda x, y: off(hadamard(8) @ y, 8 * x),
        SAME,
    ),
    "Fastfood": Row(
        lambda x: linalg.Fastfood.draw(64, key=KEY, dtype=linalg.working_dtype(x.dtype))(
            x, 64
        ),
        ("vector",),
        lambda x, y: np.abs(norm(y) / norm(x) - 1) / 10,
        exact=False,
    ),
    "fastfood": Row(
        lambda x: linalg.fastfood(x, 64, key=KEY),
        ("vector",),
        lambda x, y: np.abs(norm(y) / norm(x) - 1) / 10,
        SAME,
        exact=False,
    ),
}
# Of host numbers, dtypes and contexts, and the type of a result.
NO_ROW = {
    "RowSample",
    "Sensitivities",
    "InverseLowRankPlusDiagonal",
    "SubspaceAverage",
    "SubspaceDifference",
    "SubspaceError",
    "TruncatedSVD",
    "Woodbury",
    "carrying_precision",
    "check_polar_method",
    "check_rank",
    "increment",
    "product_rounding",
    "products_at",
    "rounding",
    "working_dtype",
}


def inputs(row, seed, dtype="float32"):
    rng = np.random.default_rng(seed)
    return [KINDS[kind][0](rng).astype(dtype) for kind in row.takes]


def tolerance(row, dtype):
    # Condition 25 at most, of squares; a few dozen operations on top of it.
    return 2000 * float(jnp.finfo(dtype).eps) if row.exact else 0.1


def is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def wide(x):
    """On the host; numbers in float64, while those that count or choose stay."""
    return np.asarray(x, np.float64 if is_float(x) else x.dtype)


def leaves(out):
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(out)]


@pytest.fixture(scope="module", params=TABLE)
def name(request):
    """Of a row, whose tests follow each other and share its programs."""
    return request.param


@functools.cache
def program(name):
    return jax.jit(TABLE[name].call)


def test_every_public_function_has_a_row():
    public = {
        name
        for name, value in vars(linalg).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert {name.split("(")[0] for name in TABLE} | NO_ROW == public


quick = pytest.mark.slow_but(
    "svd", "truncated_svd(randomized)", "geodesic", "polar(polar_express)", "sample_rows"
)


@quick
def test_a_batch_is_a_loop_and_degenerate_members_are_finite(name, getkey):
    """A batch of a generic member, zero and one of rank one, in one program."""
    row = TABLE[name]
    generic = inputs(row, getkey.seed)
    lesser = [KINDS[kind][1](x) for kind, x in zip(row.takes, generic, strict=True)]
    members = [generic, list(map(np.zeros_like, generic)), lesser]
    run = program(name)
    out = jax.jit(jax.vmap(run))(*(np.stack(x) for x in zip(*members, strict=True)))
    alone = run(*generic)
    for batch, one in zip(leaves(out), leaves(alone), strict=True):
        scale = max(1.0, np.abs(one).max())
        np.testing.assert_allclose(batch[0], one, atol=tolerance(row, jnp.float32) * scale)
        assert np.all(np.isfinite(batch[0]))
        if row.singular:
            assert np.all(np.isfinite(batch))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_result_is_right_to_rounding(name, dtype, getkey):
    row = TABLE[name]
    given = inputs(row, getkey.seed, dtype)
    out = program(name)(*given)
    for leaf in jax.tree.leaves(out):
        assert leaf.dtype == dtype or not is_float(leaf)
    assert row.error(*map(wide, given), jax.tree.map(wide, out)) < tolerance(row, dtype)


@quick
def test_half_precision_is_computed_in_single(name, getkey):
    row, run = TABLE[name], program(name)
    given = inputs(row, getkey.seed, jnp.bfloat16)
    out = run(*given)
    single = run(*(x.astype(np.float32) for x in given))
    for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(single), strict=True):
        if not is_float(x):
            assert np.all(x == y)
            continue
        assert x.dtype == (jnp.bfloat16 if row.half == SAME else jnp.float32)
        x, eps, y = wide(x), float(jnp.finfo(x.dtype).eps), wide(y)
        np.testing.assert_allclose(x, y, atol=eps * 8 * max(1.0, norm(y)))
