import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..._arguments import check_key
from ..._dense import dense
from ...lowrank import LowRank, lora_init
from ._weights import check_input, check_layer_rank, dense_linear, made_of


class SparsePlusLowRankLinear(eqx.Module):
    """A linear layer ``y = (left rightᵀ + S) x + b`` with a sparse ``S`` of fixed places.

    A product of thin factors alone cannot be a matrix of full rank, however long it is
    trained; with a few entries at random places it can. Only ``r (in + out)`` numbers and
    the values of ``S`` are trained. Each product forms the dense matrix, multiplies and
    forgets it, and so does its gradient: what is kept between the passes are the input,
    the factors, the values and their places. So it saves memory, not flops.

    The start is that of the paper: ``left = 0``, ``right`` and the values uniform in
    ``±1/sqrt(in)``, the places random. Its factor ``alpha / r`` in front of the product is
    a rate of its own for the factors, as :func:`lrjax.scale_factors` gives them.

    Args:
        in_features: the size of the input.
        out_features: the size of the output.
        rank: the width of the factors.
        density: the share of the entries that are in ``S``.
        use_bias: whether there is a bias.
        dtype: of weight and bias.
        key: for the start.

    Attributes:
        weight: the :class:`~lrjax.LowRank`, ``(out, in)``.
        values: ``(k,)``, the entries of ``S``.
        indices: ``(k,)`` integers, their places in the flattened matrix, ascending.
        bias: ``(out,)``, or ``None``.

    Raises:
        TypeError: for a rank that is no integer.
        ValueError: for a rank that the matrix cannot have, or a density that leaves no
            entry or more than all.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> make = lrjax.nn.SparsePlusLowRankLinear
        >>> layer = make(64, 32, 4, density=0.05, key=jax.random.key(0))
        >>> layer(jnp.ones(64)).shape, layer.weight.rank, layer.values.shape
        ((32,), 4, (102,))

    Reference:
        A. Han et al., "SLTrain: a sparse plus low-rank approach for parameter and memory
        efficient pretraining" (2024), arXiv 2406.02214.
    """

    weight: LowRank
    values: Float[Array, "*b k"]
    indices: Int[Array, "*b k"]
    bias: Float[Array, "*b out"] | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        density: float = 0.03,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        check_key("SparsePlusLowRankLinear", key)
        shape = (out_features, in_features)
        check_layer_rank("SparsePlusLowRankLinear", rank, shape)
        size = out_features * in_features
        count = round(density * size)
        if not 1 <= count <= size:
            raise ValueError(
                f"density must leave between 1 and all {size} entries of a matrix "
                f"{shape}, got {density}."
            )
        factors, places, values, bias = jr.split(key, 4)
        dtype = jnp.result_type(float) if dtype is None else dtype
        edge = in_features**-0.5
        uniform = lambda key, n: jr.uniform(key, (n,), dtype, -edge, edge)
        self.weight = lora_init(shape, rank, key=factors, dtype=dtype)
        self.values = uniform(values, count)
        self.indices = jnp.sort(jr.choice(places, size, (count,), replace=False))
        self.bias = uniform(bias, out_features) if use_bias else None

    @classmethod
    def from_node(
        cls,
        weight: LowRank,
        bias: Array | None = None,
        *,
        values: Float[Array, "*b k"],
        indices: Int[Array, "*b k"],
    ) -> "SparsePlusLowRankLinear":
        """The layer of parts that are there already, those of a robust PCA say.

        Args:
            weight: ``(*b, out, in)``.
            bias: ``(*b, out)``, or ``None`` for none.
            values: ``(*b, k)``.
            indices: ``(*b, k)`` places in the flattened matrix, ascending and different.

        Returns:
            The layer.

        Raises:
            TypeError: for a weight that is no :class:`~lrjax.LowRank`.
            ValueError: for values and indices that do not belong together, or a bias of
                another size.
        """
        if not isinstance(weight, LowRank):
            raise TypeError(
                f"{cls.__name__}.from_node takes a lrjax.LowRank, got {type(weight)}."
            )
        fits = values.shape == indices.shape and values.shape[:-1] == weight.shape[:-2]
        if not fits or not jnp.issubdtype(indices.dtype, jnp.integer):
            raise ValueError(
                f"{cls.__name__} needs an integer place for each value beside a weight of "
                f"shape {weight.shape}, got values {values.shape} and {indices.dtype} "
                f"indices {indices.shape}."
            )
        if bias is not None and bias.shape != weight.shape[:-1]:
            raise ValueError(
                f"{cls.__name__} needs a bias of shape {weight.shape[:-1]} beside a weight "
                f"of shape {weight.shape}, got {bias.shape}."
            )
        return made_of(cls, weight=weight, values=values, indices=indices, bias=bias)

    @property
    def in_features(self) -> int:
        """The size of the input."""
        return self.weight.shape[-1]

    @property
    def out_features(self) -> int:
        """The size of the output."""
        return self.weight.shape[-2]

    @property
    def use_bias(self) -> bool:
        """Whether there is a bias."""
        return self.bias is not None

    def __call__(
        self, x: Array, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, " out"]:
        """``(left rightᵀ + S) x + b`` for one vector.

        Args:
            x: ``(in,)``.
            key: not used, as in ``eqx.nn.Linear``.

        Returns:
            ``(out,)``.

        Raises:
            ValueError: for an input of another shape.
        """
        del key
        check_input(self, x, (self.in_features,))
        # A custom derivative would see single vectors under vmap, and form a dense gradient
        # for each of them; a checkpoint is differentiated after the batching.
        product = lambda x, *parts: dense(x, _summed(*parts))
        y = jax.checkpoint(product)(x, self.weight, self.values, self.indices)
        return y if self.bias is None else y + self.bias

    def to_dense(self) -> eqx.nn.Linear:
        """The same layer with one dense weight."""
        summed = _summed
        for _ in range(self.weight.ndim - 2):
            summed = jax.vmap(summed)
        return dense_linear(summed(self.weight, self.values, self.indices), self.bias)


def _summed(weight: LowRank, values: Array, indices: Array) -> Float[Array, "out in"]:
    """The dense weight."""
    low_rank = (weight.left @ weight.right.T).reshape(-1)
    places = low_rank.at[indices]
    full = places.add(values, indices_are_sorted=True, unique_indices=True)
    return full.reshape(weight.shape)
