import math

import optax
from jaxtyping import ArrayLike

from .. import subspaces as sub
from .._matrices import DefaultRule, MatrixSpec, Where, is_input_first, map_matrices
from ..subspaces import is_hidden_matrix, project_updates
from ..transforms import orthogonalize_updates


def outputs_as_rows(where: Where | None) -> Where:
    """The same choice of matrices, each seen with its outputs as rows.

    They are the columns of leaves called ``kernel``, which Flax stores ``(inputs,
    outputs)``, and of those called ``right``: a :class:`lrjax.LowRank` holds the second
    factor ``A (r, n)``, whose ``r`` outputs are the inputs of the first, as ``Aᵀ (n, r)``.
    A ``MatrixSpec`` that a user's rule answers is taken at its word.
    """
    rule = is_hidden_matrix if where is None else where
    is_default = where is None or isinstance(where, DefaultRule)

    def oriented(path: str, shape: tuple[int, ...]) -> bool | MatrixSpec:
        answer = rule(path, shape)
        told = isinstance(answer, MatrixSpec)
        if not told and not answer:
            return False
        spec = answer if told else MatrixSpec()
        input_first = is_input_first(path) or is_factor(path, "right")
        if input_first and (is_default or not told):
            return MatrixSpec(spec.cols, spec.rows)
        return spec

    return DefaultRule(oriented) if is_default else oriented


def is_factor(path: str, *sides: str) -> bool:
    """Whether a leaf is called as the factors of a node are."""
    return path.split(".")[-1] in (sides or ("left", "right"))


def matrices_and_factors(path: str, shape: tuple[int, ...]) -> bool | MatrixSpec:
    """Hidden matrices, and factors of any width."""
    return is_hidden_matrix(path, shape) or (len(shape) > 1 and is_factor(path))


def outputs_over_inputs(where: Where, least: float = 0.0) -> optax.GradientTransformation:
    """``√(m/n) U`` for a matrix of ``m`` outputs, ``n`` inputs; ``m/n`` not below a least.

    An ``U`` with singular values one then changes typical activations by their own size.
    """

    def scale(updates, params=None):
        del params

        def one(leaf, u):
            outputs, inputs = leaf.sides
            return (u * max(outputs / inputs, least) ** 0.5,)

        return map_matrices("The recipe", where, one, updates)[0]

    return optax.stateless(scale)


def orthogonalize_some(
    fraction: float | None, momentum: ArrayLike, side: sub.Side, where: Where | None
) -> optax.GradientTransformationExtraArgs:
    """The polar factor of the rows of a momentum that are largest in sum of magnitudes.

    ``M ← M + G``; the rows that are used are multiplied by ``momentum`` afterwards.
    """
    share = 0.25 if fraction is None else fraction
    if not 0 < share <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}.")

    def count(path: str, sides: tuple[int, int]) -> int:
        del path
        return math.ceil(share * (sides[0] if side == "left" else min(sides)))

    return project_updates(
        orthogonalize_updates(where=lambda path, shape: True),
        sub.SelectedRows(count, choice="topk_l1", side=side),  # pyright: ignore[reportCallIssue]
        schedule=sub.Always(),
        feedback=sub.ErrorFeedback(b1=0.0, momentum=momentum),
        where=where,
    )
