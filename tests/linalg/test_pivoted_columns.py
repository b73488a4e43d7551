"""The columns that LAPACK's QR with pivoting takes."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.linalg

from lrjax.linalg import pivoted_columns


def test_they_are_those_of_lapack_for_every_matrix_of_a_batch(getkey):
    x = jr.normal(getkey(), (2, 3, 6, 9))
    got = jax.jit(pivoted_columns, static_argnums=1)(x, 5)
    for i, j in np.ndindex(2, 3):
        want = scipy.linalg.qr(np.asarray(x[i, j]), mode="r", pivoting=True)[1][:5]
        np.testing.assert_array_equal(got[i, j], want)


def test_zero_and_dependent_columns_are_taken_last_and_once():
    x = jnp.zeros((4, 4)).at[0, 2].set(1e30).at[1, 3].set(1e15)
    np.testing.assert_array_equal(pivoted_columns(x, 4), [2, 3, 0, 1])


def test_a_rank_that_is_too_large_is_refused():
    with pytest.raises(ValueError, match=r"between 1 and min\(m, n\) = 3"):
        pivoted_columns(jnp.ones((3, 5)), 4)
