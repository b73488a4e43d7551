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
    outputs)``. A ``MatrixSpec`` that a user's rule answers is taken at its word.
    """
    rule = is_hidden_matrix if where is None else where

    def oriented(path: str, shape: tuple[int, ...]) -> bool | MatrixSpec:
        answer = rule(path, shape)
        told = isinstance(answer, MatrixSpec)
        if not told and not answer:
            return False
        spec = answer if told else MatrixSpec()
        if is_input_first(path) and (where is None or not told):
            return MatrixSpec(spec.cols, spec.rows)
        return spec

    is_default = where is None or isinstance(where, DefaultRule)
    return DefaultRule(oriented) if is_default else oriented


def outputs_over_inputs(where: Where) -> optax.GradientTransformation:
    """``√(m/n) U`` for a matrix of ``m`` outputs and ``n`` inputs.

    An ``U`` with singular values one then changes typical activations by their own size.
    """

    def scale(updates, params=None):
        del params

        def one(leaf, u):
            outputs, inputs = leaf.sides
            return (u * (outputs / inputs) ** 0.5,)

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
