import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from ..._sites import flat_leaves
from ...linalg import order_statistic
from ..binding import adapted_sites, dense_change
from ..kinds.factors import RESERVE, Factors
from ..protocol import Adapters
from ._table import Table


def change_sensitivity(
    model: PyTree, adapters: Adapters, gradient: PyTree
) -> dict[str, Float[Array, "*b"]]:
    """How much the loss hangs on the whole change of each weight.

    ``Σ |ΔW ⊙ ∂L/∂W'| / √(out · in)`` with the dense change ``ΔW = W' − W``: samples for
    :class:`lrjax.transforms.Sensitivity`, from which :func:`lrjax.adapters.grow_ranks`
    decides.

    Args:
        model: that :func:`lrjax.adapt` saw.
        adapters: all of them.
        gradient: of the loss with respect to the merged model, as ``eqx.filter_grad(loss)
            (lrjax.merge(model, adapters))`` gives it. It costs what full fine-tuning does.

    Returns:
        ``{path: (*b,)}``, a number for each matrix.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> layer = eqx.nn.Linear(4, 1, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(layer, lrjax.LoRA(1), key=jax.random.key(1))
        >>> ones = lrjax.LowRank(jnp.ones((1, 1)), jnp.ones((4, 1)))
        >>> adapters = eqx.tree_at(lambda a: a.layers[""].pair, adapters, ones)
        >>> loss = lambda layer: layer(jnp.array([1.0, -2.0, 3.0, 0.0]))[0]
        >>> gradient = eqx.filter_grad(loss)(lrjax.merge(layer, adapters))
        >>> print(lrjax.adapters.change_sensitivity(layer, adapters, gradient)[""])
        3.0

    Reference:
        F. Zhang et al., "IncreLoRA: incremental parameter allocation method for
        parameter-efficient fine-tuning" (2023), arXiv:2308.12043.
    """
    slopes, found = dict(flat_leaves(gradient)[0]), {}
    for path, (site, _, ready) in adapted_sites(model, adapters).items():
        product = jnp.abs(dense_change(site, ready()) * site.of(slopes[path]).matrix())
        out, inputs = site.shape
        found[path] = jnp.sum(product, axis=(-2, -1)) / jnp.sqrt(out * inputs)
    return found


def grow_ranks(
    adapters: Adapters,
    scores: dict[str, Array],
    target: ArrayLike,
    *,
    matrices: ArrayLike,
    columns: int = 1,
) -> Adapters:
    """Give new ranks to the matrices with the highest scores.

    For adapters of :class:`lrjax.adapters.IncreLoRA`. The columns in reserve of the chosen
    matrices come into use, with the small gate that they had, which is trained from now
    on, and the next ones go into reserve. So the adapted model stays what it is, but for
    its scale, ``alpha / rank``. When the target is reached, nothing is in reserve any more.

    Args:
        adapters: all of them, not a half of a partition.
        scores: ``{path: (*b,)}``, those of a :class:`lrjax.transforms.Sensitivity`.
        target: how many columns are in use in the end, in all matrices together.
        matrices: how many grow at once; all that tie with the last do.
        columns: by how many columns each, as many as there are in reserve.

    Returns:
        Adapters with other masks and gates: the same shapes, so that growth needs no
        compilation. A matrix whose columns are all in use does not grow.

    Raises:
        ValueError: if no adapter has a mask, or one with a mask has no gate.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> model = eqx.nn.MLP(4, 4, 4, 1, key=jax.random.key(0))
        >>> kind = lrjax.adapters.IncreLoRA(rank=4)
        >>> adapters = lrjax.adapt(model, kind, key=jax.random.key(1))
        >>> scores = {"layers.0": jnp.array(1.0), "layers.1": jnp.array(2.0)}
        >>> more = lrjax.adapters.grow_ranks(adapters, scores, 4, matrices=1)
        >>> more["layers.1"].mask.round(6).tolist()
        [1.0, 1.0, 9.999999747378752e-06, 0.0]

    Reference:
        F. Zhang et al., "IncreLoRA: incremental parameter allocation method for
        parameter-efficient fine-tuning" (2023), arXiv:2308.12043.
    """
    table = Table("grow_ranks", adapters)
    if lacking := [path for path, own in table.factors.items() if own.gate is None]:
        raise ValueError(
            f"grow_ranks found no gate at {lacking}: adapt these layers with "
            "lrjax.adapters.IncreLoRA."
        )
    ranks = jnp.sum(table.mask >= 1, axis=1)
    score, total = table.rows(scores), jnp.sum(ranks)
    able = (ranks + columns <= table.exists.sum(axis=1)) & (total < target)
    count = jnp.minimum(matrices, target - total)
    level = order_statistic(jnp.where(able, score, 0), count, axis=0)[0]
    ranks += columns * (able & (score >= level))
    index = jnp.arange(table.mask.shape[1])[None, :]
    behind = (index < ranks[:, None] + columns) & (jnp.sum(ranks) < target)
    mask = jnp.where(index < ranks[:, None], 1.0, jnp.where(behind, RESERVE, 0.0))
    mask = jnp.where(table.exists, mask, 0)
    new = table.apart((mask >= 1) & (table.mask < 1))
    old = table.apart(table.mask)

    def start(path: str, factors: Factors) -> Factors:
        """The gate that a column had in reserve."""
        gate = jnp.asarray(factors.gate)
        held = (gate * old[path]).astype(gate.dtype)
        gate = jnp.where(new[path], held, gate)
        return eqx.tree_at(lambda a: a.gate, factors, gate)

    return table.put(adapters, mask, start)
