from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike, PyTree

from ....linalg import working_dtype


class Sensitivity(NamedTuple):
    """Running averages of how much a loss hangs on each number, and of how that varies.

    From samples ``I``, such as ``|θ ∘ ∇θ|``, the change of the loss to first order if a
    number were zero::

        mean      ← b1 · mean      + (1 − b1) · I
        deviation ← b2 · deviation + (1 − b2) · |I − mean|

    with the new mean in the second line. The score is ``mean · deviation``: what matters,
    and what is not yet settled.

    Attributes:
        mean: a tree of averages, in float32 or higher.
        deviation: of the same structure.

    Example:
        >>> import jax.numpy as jnp
        >>> from lrjax.transforms import Sensitivity
        >>> start = Sensitivity.zeros({"w": jnp.ones(2)})
        >>> once = start.updated({"w": jnp.array([1.0, 3.0])}, b1=0.5, b2=0.5)
        >>> print(once.scores()["w"])  # means 0.5 and 1.5, deviations 0.25 and 0.75
        [0.125 1.125]

    Reference:
        Q. Zhang et al., "PLATON: pruning large transformer models with upper confidence
        bound of weight importance" (2022), arXiv:2206.12562.
    """

    mean: PyTree
    deviation: PyTree

    @classmethod
    def zeros(cls, tree: PyTree) -> "Sensitivity":
        """Averages of nothing yet, for numbers in a tree of this structure."""
        zero = lambda x: jnp.zeros(x.shape, working_dtype(x.dtype))
        return cls(jax.tree.map(zero, tree), jax.tree.map(zero, tree))

    def updated(self, sample: PyTree, b1: ArrayLike, b2: ArrayLike) -> "Sensitivity":
        """With one more sample."""
        average = lambda b, old, new: (b * old + (1 - b) * new).astype(old.dtype)
        mean = jax.tree.map(lambda m, i: average(b1, m, i), self.mean, sample)
        deviation = jax.tree.map(
            lambda d, m, i: average(b2, d, jnp.abs(i - m)), self.deviation, mean, sample
        )
        return Sensitivity(mean, deviation)

    def scores(self) -> PyTree:
        """The product of both."""
        return jax.tree.map(jnp.multiply, self.mean, self.deviation)


def cubic_schedule(
    first: ArrayLike, last: ArrayLike, *, begin: ArrayLike, end: ArrayLike
) -> optax.Schedule:
    """From one number to another, fast in the beginning: what budgets of ranks follow.

    ``last + (first − last) · (1 − (t − begin) / (end − begin))³`` from step ``begin`` to
    step ``end``, and the two numbers outside. All may be traced.

    Args:
        first: up to step ``begin``.
        last: from step ``end`` on.
        begin: a step.
        end: a later one.

    Returns:
        A function of the step.

    Example:
        >>> import lrjax
        >>> budget = lrjax.transforms.cubic_schedule(9.0, 1.0, begin=10, end=20)
        >>> [round(float(budget(step)), 3) for step in (0, 10, 15, 20, 30)]
        [9.0, 9.0, 2.0, 1.0, 1.0]

    Reference:
        M. Zhu, S. Gupta, "To prune, or not to prune: exploring the efficacy of pruning
        for model compression" (2017), arXiv:1710.01878. With plain steps it is
        ``optax.polynomial_schedule`` of power 3.
    """

    def schedule(count):
        done = (count - begin) / (jnp.asarray(end, jnp.float32) - begin)
        fall = jnp.asarray(first) - last
        return last + fall * (1 - jnp.clip(done, 0, 1)) ** 3

    return schedule
