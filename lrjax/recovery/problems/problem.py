import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ...lowrank import LowRank, add, norm
from .losses import Objective
from .operators import Operator


class Problem(eqx.Module):
    """Find a low-rank matrix from measurements: ``min objective(A(X) − y)``.

    A pytree whose data are leaves: give problems to jitted functions as arguments, and
    ``vmap`` over problems, or over one member's options with the problem unbatched.

    Attributes:
        operator: ``A``, what is measured of a matrix.
        targets: ``y``, the measurements.
        objective: what is minimized of the residuals.
        truth: the matrix to be found, in factors or dense, where it is known.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> from lrjax import recovery
        >>> x = lrjax.LowRank(jnp.ones((2, 1)), jnp.ones((3, 1)))
        >>> y = 2 * jnp.ones((2, 3))
        >>> problem = recovery.Problem(recovery.Identity((2, 3)), y, recovery.L1(), y)
        >>> float(problem.loss(x)), float(problem.relative_error(x).round(4))
        (6.0, 0.5)
    """

    operator: Operator
    targets: Float[Array, "..."]
    objective: Objective
    truth: LowRank | Float[Array, "m n"] | None = None

    def __check_init__(self):
        if not isinstance(self.operator, Operator):
            raise TypeError(
                f"Problem needs an operator, got {type(self.operator)}: derive a class "
                "from lrjax.recovery.Operator with shape, that of the matrix, and "
                "__call__(self, x), the measurements of a lrjax.LowRank; its adjoint "
                "comes by itself."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``, the shape of the matrix to be found."""
        return self.operator.shape

    def residual(self, x: LowRank) -> Float[Array, "..."]:
        """``A(X) − y``."""
        return self._measured(x) - self.targets

    def loss(self, x: LowRank) -> Float[Array, ""]:
        """The objective at a matrix in factors, less a constant of gross measurements.

        At the truth it is the ``f_min`` of Polyak steps, if the truth has low rank. The
        constant, :meth:`Objective.between`, is zero unless some measurements are hundreds
        of times larger than most.
        """
        return self.objective.between(self._measured(x), self.targets)

    def _measured(self, x: LowRank) -> Float[Array, "..."]:
        measured = self.operator(x)
        if measured.shape != self.targets.shape:
            raise ValueError(
                f"{type(self.operator).__name__} measures numbers of shape "
                f"{measured.shape}, but targets has shape {self.targets.shape}."
            )
        return measured

    def relative_error(self, x: LowRank) -> Float[Array, ""]:
        """``‖X − truth‖_F / ‖truth‖_F``; infinite for a matrix that diverged.

        Raises:
            ValueError: if the truth is not known.
        """
        if self.truth is None:
            raise ValueError(
                "relative_error needs the truth, which this problem does not have "
                "(truth=None); watch problem.loss(x) instead."
            )
        if isinstance(self.truth, LowRank):
            # Products of such numbers overflow: a NaN would hide that the run diverged.
            limit = jnp.finfo(x.dtype).max ** 0.25
            tame = jnp.all(jnp.abs(x.left) < limit) & jnp.all(jnp.abs(x.right) < limit)
            x = LowRank(jnp.where(tame, x.left, 0), jnp.where(tame, x.right, 0))
            difference = add(x, LowRank(-self.truth.left, self.truth.right))
            return jnp.where(tame, norm(difference) / norm(self.truth), jnp.inf)
        difference = x.materialize() - self.truth
        return jnp.linalg.norm(difference) / jnp.linalg.norm(self.truth)
