import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PRNGKeyArray, PyTree

from ..._arguments import check_key
from ..._tree import check_has_nodes, check_whole, map_nodes
from ...lowrank import LowRank, columns_in_use, first_columns, is_low_rank


def sample_prefix(params: PyTree, *, key: PRNGKeyArray) -> PyTree:
    """Cut one random layer in factors to a random number of its first columns.

    Every pair of a layer and a width, from 1 to the columns that are in use there, is
    equally likely; the other layers stay whole. A loss of the result, with a new key in
    each step, trains the columns in an order: those of small index are there in most
    steps, so that what matters goes into them. Gradients of columns that are cut are zero.

    Args:
        params: a tree with LowRank nodes; each matrix of a stack is a layer.
        key: which layer and width.

    Returns:
        The tree, with zeros in the two factors of that layer.

    Raises:
        TypeError: if ``key`` is none.
        ValueError: if the tree holds no LowRank node.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> params = {"w": lrjax.LowRank(jnp.eye(3), jnp.eye(3)), "b": jnp.ones(3)}
        >>> loss = lambda params, key: jnp.sum(
        ...     lrjax.transforms.sample_prefix(params, key=key)["w"].materialize())
        >>> keys = jax.random.split(jax.random.key(0), 100)
        >>> print(set(jax.vmap(loss, (None, 0))(params, keys).tolist()))
        {1.0, 2.0, 3.0}

    Reference:
        S. Horváth, S. Laskaridis, S. Rajput, H. Wang, "Maestro: uncovering low-rank
        structures via trainable decomposition" (2023), arXiv 2308.14929.
    """
    check_key("sample_prefix", key)
    check_has_nodes("sample_prefix", params)
    check_whole("sample_prefix", params)
    nodes = filter(is_low_rank, jax.tree.leaves(params, is_leaf=is_low_rank))
    counts = [columns_in_use(x) for x in nodes]
    ends = jnp.cumsum(jnp.concatenate([c.ravel() for c in counts]))
    ticket = jr.randint(key, (), 0, ends[-1])
    begin = 0

    def cut(x: LowRank) -> LowRank:
        nonlocal begin
        own = columns_in_use(x)
        end = ends[begin : begin + own.size].reshape(own.shape)
        begin += own.size
        width = ticket - (end - own) + 1
        drawn = (width > 0) & (width <= own)
        return first_columns(x, jnp.where(drawn, width, own))

    return map_nodes(cut, params)
