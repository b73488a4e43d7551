from collections.abc import Iterable
from typing import Any

from jaxtyping import ArrayLike, PRNGKeyArray, PyTree

from .._arguments import check_key
from .._sites import Where
from ..lowrank import knapsack_ranks
from ..nn import FactorReport
from ._parts import Method
from .decompose import Allocate, decompose
from .statistics import Call, layer_statistics, over_batch


def compress(
    model: PyTree,
    batches: Iterable[Any],
    *,
    budget: int | float | None = None,
    energy: float | None = None,
    method: Method = "sensitivity",
    call: Call = over_batch,
    where: Where = None,
    allocate: Allocate = knapsack_ranks,
    damping: ArrayLike = 1e-2,
    key: PRNGKeyArray | None = None,
) -> tuple[PyTree, FactorReport]:
    """A trained model in fewer numbers, its layers in factors that fit what they do.

    One pass over some batches sums the second moment ``C`` of the inputs of each layer, and
    the second moment ``G`` of the gradients at its outputs. Then each weight becomes the
    best product of thin factors for them, :func:`~lrjax.compression.weighted_factors`, of
    a rank that an allocator chooses for all layers at once. The methods differ in what they
    weigh the error ``E = W − X`` by:

    - ``"svd"``: ``‖E‖²``, without the data;
    - ``"inputs"``: ``tr(E C Eᵀ)``, the error of what the layer gives;
    - ``"covariance"``: the same after the mean of that error went into the bias, ``b' = b +
      E[(W − X) x]``, with the covariance of the inputs in place of C;
    - ``"projections"``: W projected on the principal directions of its inputs and of its
      outputs, ``P P_rᵀ W V_r V_rᵀ``, as many of each as hold the energy;
    - ``"sensitivity"``: ``tr(G E C Eᵀ)``, how far the error moves the outputs of the model.

    The last one measures all layers by one yardstick. Errors of the others are relative,
    ``tr(E C Eᵀ) / tr(W C Wᵀ)``, for ranks within a budget: layer with layer cannot be
    compared.

    Layers are found where they are called, as by
    :func:`lrjax.adapters.activation_statistics`: embeddings by how often each entry is
    asked for. Layers stacked for ``scan`` share a rank, and each has its own factors.
    Padding is an input like others: batches without it fit better. For several sizes or
    methods see :func:`~lrjax.compression.decompose`.

    Args:
        model: the module; it is not changed.
        batches: anything to go through once, some thousands of inputs in all.
        budget: how many numbers the whole model may have; as a float, which share of those
            that it has.
        energy: in place of a budget the share of its weighed error that each layer keeps,
            in (0, 1].
        method: what errors are weighed by.
        call: ``(model, batch) -> outputs``, by default ``jax.vmap(model)(batch)``.
        where: which layers, as in :func:`lrjax.adapt`; by default all ``eqx.nn.Linear``,
            ``Conv`` and ``Embedding``.
        allocate: ``(spectra, shapes, budget) -> ranks`` by path, in place of
            :func:`~lrjax.lowrank.knapsack_ranks`. Layers that it leaves out stay dense.
        damping: added to the diagonals of C and G, relative to their means, against what
            the batches happen not to show.
        key: for the random signs behind G; by default the same in every call.

    Returns:
        The model, with layers of ``lrjax.nn`` that are called as before, and a report
        with a line for each layer: its rank, its size, the errors of its weight and of its
        outputs on the batches, or why it was kept dense.

    Raises:
        ValueError: unless one of budget and energy is given, for a method that is none, if
            there are no batches, if a budget is out of reach, or ``where`` names what
            cannot be compressed.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(32, 8, 64, 2, key=jax.random.key(0))
        >>> narrow = jax.random.normal(jax.random.key(1), (6, 32))
        >>> codes = jax.random.normal(jax.random.key(2), (4, 100, 6))
        >>> small, report = lrjax.compression.compress(model, codes @ narrow, budget=0.5)
        >>> report.ratio <= 0.5, report.layers[0].rank < 10
        (True, True)

    Reference:
        A. Kaushal, T. Vaidhya, I. Rish, "LORD: low rank decomposition of monolingual code
        LLMs for one-shot compression" (2023), arXiv 2309.14021, and Y. Yu et al., "Unified
        low-rank compression framework for click-through rate prediction" (2024), arXiv
        2405.18146, for weights by inputs; I. Garg et al., "Revealing the utilized rank of
        subspaces of learning in neural networks" (2024), arXiv 2407.04797, for projections.
    """
    check_key("compress", key)
    statistics = layer_statistics(
        model,
        batches,
        call=call,
        where=where,
        sensitivity=method == "sensitivity",
        key=key,
    )
    parts = decompose(model, statistics, method=method, damping=damping)
    return parts.cut(budget=budget, energy=energy, allocate=allocate)
