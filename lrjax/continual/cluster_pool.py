from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray, PyTree

from .._arguments import check_key
from ..linalg import nonzero, working_dtype


class ClusterPool(eqx.Module):
    """Samples of a stream, kept by clusters, so that no task is needed to choose them.

    A pool has Q clusters of at most P points. A new point opens a cluster as long as there
    are fewer than Q. Afterwards it joins the one whose mean is nearest, from which the
    oldest point goes if there are then more than P::

        q = argmin_q ‖z − μ_q‖        μ_q ← mean of the points now in q

    Recent points of what comes often do not push out what came long ago, as they do in a
    buffer of the last samples, and nobody says where one task ends.

    A task that begins when all clusters are open has to take the nearest one of another
    task. With ``merge=True`` a point that is farther from every mean than the two nearest
    means are from each other opens a cluster of its own, and these two become one, of
    their P newest points. In streams of turned and of permuted digits that kept more of
    what task labels are worth, for A-GEM and for OGD.

    Several pools lie in one object: one for each class, so that no label is crowded out.

    Attributes:
        points: the points, a tree with leading axes ``(pools, Q, P)``.
        carried: what goes with each of them, labels for instance, with the same axes.
        born: when each of them came, and -1 where there is none ``(pools, Q, P)``.
        means: of the points of each cluster, a tree with leading axes ``(pools, Q)``.
        time: how many points were offered.
        merge: whether clusters merge.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> pool = lrjax.continual.ClusterPool.start(jnp.zeros(1), clusters=2, size=2)
        >>> for z in (0.0, 10.0, 1.0, 2.0, 12.0):
        ...     pool = pool.add(jnp.array([z]))
        >>> print(pool.means[0].T, pool.counts())
        [[ 1.5 11. ]] [[2 2]]

        A batch for the reference gradient; the mask says what is in it:

        >>> points, _, there = pool.contents()
        >>> print(points[:, 0], there)
        [ 2.  1. 10. 12.] [ True  True  True  True]

    Reference:
        C. Lamers, R. Vidal, N. Belbachir, N. van Stein, T. Bäck, P. Giampouras,
        "Clustering-based domain-incremental learning" (2023), arXiv 2309.12078. Merging is
        that of STRATA, by O. Beabout, A. Dodd, T. Murphy and E. Lu. Special case: one
        cluster is a buffer of the last P points.
    """

    points: PyTree[Array]
    carried: PyTree[Array]
    born: Int[Array, "*b pools clusters size"]
    means: PyTree[Array]
    time: Int[Array, "*b"]
    merge: bool = eqx.field(static=True, default=False)

    @staticmethod
    def start(
        point: PyTree,
        carried: PyTree = None,
        *,
        clusters: int = 10,
        size: int = 3,
        pools: int = 1,
        merge: bool = False,
    ) -> "ClusterPool":
        """A pool without points.

        Args:
            point: one point, or its ``jax.ShapeDtypeStruct``: an array or a tree of real
                ones, that distances are taken between. A sample, its features, or a
                gradient.
            carried: what goes with a point, of any dtype.
            clusters: Q, of each pool.
            size: P, how many points a cluster has at most.
            pools: how many of them.
            merge: whether a far point opens a cluster when there are Q already, and the
                two nearest ones merge.

        Raises:
            ValueError: for less than one of anything, merging with less than two clusters,
                or a point without real numbers.
        """
        sizes = {"clusters": clusters, "size": size, "pools": pools}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"ClusterPool.start needs {name} >= 1, got {value}.")
        if merge and clusters < 2:
            raise ValueError("A ClusterPool of one cluster has no two that could merge.")
        leaves = jax.tree.leaves(point)
        dtypes = [jnp.result_type(x) for x in leaves]
        if not leaves or not all(jnp.issubdtype(d, jnp.floating) for d in dtypes):
            raise ValueError(
                "The points of a ClusterPool are arrays of floating-point numbers, or "
                f"trees of them, got {', '.join(map(str, dtypes)) or 'no array'}: cast "
                "images with x.astype(float), and hand labels over as carried."
            )
        room = lambda *lead: lambda x: jnp.zeros((*lead, *jnp.shape(x)), jnp.result_type(x))
        wide = lambda x: jax.ShapeDtypeStruct(
            jnp.shape(x), working_dtype(jnp.result_type(x))
        )
        whole = room(pools, clusters, size)
        return ClusterPool(
            points=jax.tree.map(whole, point),
            carried=jax.tree.map(whole, carried),
            born=jnp.full((pools, clusters, size), -1, jnp.int32),
            means=jax.tree.map(room(pools, clusters), jax.tree.map(wide, point)),
            time=jnp.zeros([], jnp.int32),
            merge=merge,
        )

    def add(
        self, point: PyTree, carried: PyTree = None, *, pool: ArrayLike = 0
    ) -> "ClusterPool":
        """The pool after one more point, under ``jit``, ``scan`` and ``vmap``.

        ``O(Q d + P d)`` for points of d numbers, and with ``merge`` ``O(Q² d)``.

        Args:
            point: like that of :meth:`start`.
            carried: likewise.
            pool: the index of the pool: the label, if there is one for each.

        Raises:
            ValueError: for other shapes than those of :meth:`start`.
        """
        self._check(point, carried)
        pool = jnp.asarray(pool)
        cut = lambda tree: jax.tree.map(lambda x: x[pool], tree)
        points, kept, born, means = map(
            cut, (self.points, self.carried, self.born, self.means)
        )
        if self.merge:
            points, kept, born, means = _with_room(point, points, kept, born, means)
        used = jnp.any(born >= 0, axis=-1)
        nearest = jnp.argmin(jnp.where(used, _distances(means, point), jnp.inf))
        q = jnp.where(jnp.all(used), nearest, jnp.argmin(used))
        slot = jnp.argmin(born[q])  # one that is free, or else the oldest
        put = lambda tree, new: jax.tree.map(
            lambda x, z: x.at[q, slot].set(jnp.asarray(z, x.dtype)), tree, new
        )
        points, kept = put(points, point), put(kept, carried)
        born = born.at[q, slot].set(self.time)
        there = born[q] >= 0
        mean = lambda m, x: m.at[q].set(_mean(x[q], there))
        means = jax.tree.map(mean, means, points)
        back = lambda tree, new: jax.tree.map(lambda x, y: x.at[pool].set(y), tree, new)
        return ClusterPool(
            back(self.points, points),
            back(self.carried, kept),
            back(self.born, born),
            back(self.means, means),
            self.time + 1,
            self.merge,
        )

    def counts(self) -> Int[Array, "*b pools clusters"]:
        """How many points each cluster has."""
        return jnp.sum(self.born >= 0, axis=-1, dtype=jnp.int32)

    def contents(self) -> tuple[PyTree, PyTree, Bool[Array, " n"]]:
        """All places as one batch: the points, what they carry, which of them are there.

        Places without a point hold zeros; multiply the losses by the mask.
        """
        flat = lambda x: x.reshape(-1, *x.shape[3:])
        points, carried = jax.tree.map(flat, (self.points, self.carried))
        return points, carried, jnp.ravel(self.born) >= 0

    def sample(
        self, count: int, *, key: PRNGKeyArray
    ) -> tuple[PyTree, PyTree, Bool[Array, " n"]]:
        """Some of the points, all alike likely and none twice, and which of them are there.

        Args:
            count: how many; where there are fewer, the rest is masked.
            key: for the choice.

        Raises:
            ValueError: for more than there are places.
        """
        check_key("ClusterPool.sample", key)
        points, carried, there = self.contents()
        if not 1 <= count <= len(there):
            raise ValueError(
                f"ClusterPool.sample takes between 1 and {len(there)} points, the places "
                f"of the pool, got {count}."
            )
        score = jnp.where(there, jr.uniform(key, there.shape), -1)
        score, chosen = lax.top_k(score, count)
        points, carried = jax.tree.map(lambda x: x[chosen], (points, carried))
        return points, carried, score >= 0

    def _check(self, point: PyTree, carried: PyTree) -> None:
        for name, old, new in (
            ("point", self.points, point),
            ("carried", self.carried, carried),
        ):
            shapes = [x.shape[3:] for x in jax.tree.leaves(old)]
            given = [jnp.shape(x) for x in jax.tree.leaves(new)]
            alike = jax.tree.structure(old) == jax.tree.structure(new)
            if not alike or shapes != given:
                raise ValueError(
                    f"ClusterPool.add takes {name} as start saw it, of shapes {shapes}, "
                    f"got {given}."
                )


def _distances(means: PyTree, point: PyTree) -> Float[Array, " q"]:
    """The squared distances of a point to the means."""

    def one(m, z):
        away = m - jnp.asarray(z, m.dtype)[None]
        return jnp.sum(away**2, axis=range(1, m.ndim))

    return jax.tree.reduce(jnp.add, jax.tree.map(one, means, point))


def _mean(x: Array, there: Bool[Array, " p"]) -> Array:
    """The mean of the points that are there."""
    wide = working_dtype(x.dtype)
    mask = there.reshape(-1, *[1] * (x.ndim - 1))
    total = jnp.sum(jnp.where(mask, x.astype(wide), 0), axis=0)
    return total / nonzero(jnp.sum(there).astype(wide))


def _with_room(point: PyTree, *state: Any) -> tuple[Any, ...]:
    """A full pool with its two nearest clusters merged, if the point is farther than these.

    Args:
        point: that is to be added.
        *state: points, carried, born and means of one pool.
    """
    points, kept, born, means = state
    count, size = born.shape
    used = jnp.any(born >= 0, axis=-1)
    apart = lax.map(lambda one: _distances(means, one), means)
    apart = jnp.where(jnp.eye(count, dtype=bool), jnp.inf, apart)
    first, second = jnp.unravel_index(jnp.argmin(apart), apart.shape)
    far = jnp.all(used) & (jnp.min(_distances(means, point)) > jnp.min(apart))
    both = lambda x: jnp.concatenate([x[first], x[second]])
    ages, newest = lax.top_k(both(born), size)
    is_first, is_second = (jnp.arange(count) == index for index in (first, second))

    def row(mask, new, x):
        # As a choice, not as an update: XLA on CPU writes that in place while it reads.
        return jnp.where(mask.reshape(-1, *[1] * (x.ndim - 1)), new, x)

    def joined(x, one):
        return row(is_second, jnp.zeros_like(x), row(is_first, one[None], x))

    together = jax.tree.map(lambda x: both(x)[newest], (points, kept))
    mean = lambda m, one: joined(m, _mean(one, ages >= 0))
    new = (
        *jax.tree.map(joined, (points, kept), together),
        row(is_second, jnp.full_like(born, -1), row(is_first, ages[None], born)),
        jax.tree.map(mean, means, together[0]),
    )
    return jax.tree.map(lambda a, b: jnp.where(far, a, b), new, tuple(state))
