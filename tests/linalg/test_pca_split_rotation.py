import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax.linalg import pca_split_rotation


def moment(key, n=16):
    x = jr.normal(key, (40, n)) * jnp.logspace(0, -1.5, n)[None]
    return x.T @ x / 40


def test_the_first_block_is_the_principal_subspace(getkey):
    c = moment(getkey())
    q = pca_split_rotation(c, 3, key=getkey())
    np.testing.assert_allclose(q.T @ q, np.eye(16), atol=1e-5)
    turned = q.T @ c @ q
    scale = float(jnp.trace(c))
    np.testing.assert_allclose(turned[:3, 3:], 0, atol=1e-5 * scale)
    largest = np.linalg.eigvalsh(np.asarray(c))[::-1]
    np.testing.assert_allclose(jnp.trace(turned[:3, :3]), largest[:3].sum(), rtol=1e-4)


def test_rotations_spread_the_energy_inside_the_blocks(getkey):
    """On average over them the diagonal of a block is its mean, whatever the spectrum."""
    c = jnp.diag(jnp.array([16.0, 4.0, 1.0, 0.0, 0.0, 0.0]))
    keys = jr.split(getkey(), 400)
    diagonal = lambda key: jnp.diagonal(
        (lambda q: q.T @ c @ q)(pca_split_rotation(c, 3, key=key))
    )
    found = jax.jit(jax.vmap(diagonal))(keys)
    # Σ λ_i u_i² of u uniform on the sphere has variance 2/(d(d + 2)) (Σλ² − (Σλ)²/d).
    values = np.array([16.0, 4.0, 1.0])
    std = np.sqrt(2 / 15 * (np.sum(values**2) - values.sum() ** 2 / 3) / 400)
    np.testing.assert_allclose(found.mean(0)[:3], 7.0, atol=5 * std)
    np.testing.assert_allclose(found[:, 3:], 0, atol=1e-4)


@pytest.mark.slow
def test_whole_and_batched(getkey):
    key, stack = getkey(), jnp.stack([moment(getkey(), 6) for _ in range(3)])
    batch = pca_split_rotation(stack, 2, key=key)
    for q, c in zip(batch, stack, strict=True):
        np.testing.assert_allclose(q, pca_split_rotation(c, 2, key=key), atol=1e-4)
    whole = pca_split_rotation(stack[0], 6, key=key)
    np.testing.assert_allclose(whole.T @ whole, np.eye(6), atol=1e-5)
    with pytest.raises(ValueError, match="rank must be between 1 and"):
        pca_split_rotation(stack, 0, key=key)
