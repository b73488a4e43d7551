import jax
import jax.numpy as jnp

from lrjax._batching import any_member


def conds(f, *args):
    """How many conds the program of ``f`` has left."""
    return str(jax.make_jaxpr(f)(*args)).count("cond[")


def test_predicate_stays_a_scalar_under_nested_vmap_and_scan():
    def refresh(count, x, unbatch=any_member):
        due = unbatch(count % 3 == 0)
        return jax.lax.cond(due, lambda a: jnp.linalg.svd(a)[0], lambda a: a, x)

    x = jnp.ones((2, 4, 3, 3))
    counts = jnp.zeros((2, 4), jnp.int32)
    twice = jax.vmap(jax.vmap(refresh))
    assert conds(twice, counts, x) == 1
    naive = jax.vmap(jax.vmap(lambda c, a: refresh(c, a, unbatch=lambda due: due)))
    assert conds(naive, counts, x) == 0  # both branches run, for every member
    alone = jax.jit(refresh)(counts[0, 0], x[0, 0])
    assert jnp.allclose(jax.jit(twice)(counts, x)[1, 2], alone)


def test_any_member_is_enough():
    due = jax.vmap(any_member, out_axes=None, axis_size=3)(jnp.array([False, True, False]))
    assert bool(due)
    assert not bool(jax.vmap(any_member, out_axes=None)(jnp.zeros(3, bool)))
