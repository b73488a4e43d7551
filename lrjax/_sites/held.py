from typing import Any

import jax.tree_util as jtu


@jtu.register_pytree_node_class
class Held:
    """A pool inside bound layers: a node without leaves.

    A pool is one for all layers, so what takes the layers apart must not take it apart:
    ``scan`` and ``vmap`` go by a node without leaves, and its arrays reach the function as
    closed-over ones do, once and with their gradient.
    """

    def __init__(self, pool: Any):
        self.pool = pool

    def tree_flatten(self):
        """No leaves; the holder itself is the structure."""
        return (), self

    @classmethod
    def tree_unflatten(cls, aux, children):
        """The same holder."""
        del children
        return aux
