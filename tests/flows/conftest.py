import jax.numpy as jnp
import jax.random as jr
import pytest

from lrjax import LowRank


@pytest.fixture(autouse=True)
def _double(x64):
    """The whole room computes in float64: its claims are about the 12th digit."""


def approximation(x, target):
    return 0.5 * jnp.sum((target - x.materialize()) ** 2)


class Aligned:
    """A factorization that shares its singular vectors with the target (T1)."""

    def __init__(
        self, left=(0.0, 0.3, -0.2), right=(0.5, 0.01, 0.4), sigma=(3.0, 2.0, 1.0)
    ):
        self.left, self.right, self.sigma = map(jnp.array, (left, right, sigma))
        rank = len(sigma)
        self.u = jnp.linalg.qr(jr.normal(jr.key(0), (7, rank)))[0]
        self.v = jnp.linalg.qr(jr.normal(jr.key(1), (5, rank)))[0]
        self.target = self.matrix(self.sigma)
        self.start = LowRank(self.u * self.left[None], self.v * self.right[None])

    def matrix(self, values):
        return jnp.einsum("mk,...k,nk->...mn", self.u, values, self.v)


@pytest.fixture
def aligned():
    return Aligned()
