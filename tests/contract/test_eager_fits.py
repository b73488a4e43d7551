"""Fits called outside of ``jit`` are compiled once for data of one shape."""

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jax import monitoring

import lrjax
from lrjax import clustering, recovery


SHAPE = (12, 9)
I, J = jnp.divmod(jnp.arange(108), 9)


def completed(x, **options):
    return lrjax.fit_completion(I, J, x[I, J], SHAPE, rank=2, **options)


CALLS = {
    "fit_robust_pca": lrjax.fit_robust_pca,
    "RobustPCAFit.transform": lambda x: lrjax.fit_robust_pca(x).transform(x),
    "fit_completion": completed,
    "fit_completion, with a bar": lambda x: completed(x, progress=True),
    "CompletionFit.transform": lambda x: completed(x).transform(I, J, x[I, J], 12),
    "fit_robust_tensor": lambda x: recovery.fit_robust_tensor(x.reshape(4, 3, 9)),
    "fit_tensor_completion": lambda x: recovery.fit_tensor_completion(x.reshape(4, 3, 9)),
    "sparse_self_expression": clustering.sparse_self_expression,
    "k_subspaces": lambda x: clustering.k_subspaces(x, 2, 1, key=jr.key(0)),
    "fit_low_rank_mixture": lambda x: clustering.fit_low_rank_mixture(
        x, 2, 1, key=jr.key(0)
    ),
}


@pytest.fixture
def programs():
    """The number of programs compiled so far, in a list of one number."""
    count = [0]

    def note(event, duration_secs, **kwargs):
        del duration_secs, kwargs
        count[0] += event.endswith("backend_compile_duration")

    monitoring.register_event_duration_secs_listener(note)
    yield count
    monitoring.unregister_event_duration_listener(note)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_a_second_call_compiles_nothing(name, programs, getkey):
    one, other = jr.normal(getkey(), SHAPE), jr.normal(getkey(), SHAPE)
    jax.block_until_ready(CALLS[name](one))
    assert programs[0] > 0  # or nothing was counted
    before = programs[0]
    jax.block_until_ready(CALLS[name](other))
    assert programs[0] == before
