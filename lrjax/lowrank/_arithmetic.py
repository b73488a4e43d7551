"""What NumPy and Python's operators make of a node: nothing dense, nothing ambiguous."""

from typing import Any, NoReturn


class NoSilentArithmetic:
    """What every node refuses, in sentences, and its number of axes.

    A sum or a multiple has two meanings: that of the matrix, and that of optax, whose
    arithmetic of trees treats each factor by itself (twice the factors is four times the
    matrix). An array of a node would be dense.
    """

    shape: Any
    # Operators of NumPy arrays leave the answer to the node.
    __array_ufunc__ = None

    @property
    def ndim(self) -> int:
        """The number of axes of the dense value."""
        return len(self.shape)

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} of shape {self.shape} does not turn into an array "
            "by itself: call x.materialize() for the dense matrix, x @ v or x.matvec(v) "
            "for products."
        )

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} has no +, -, * and /, because optax's arithmetic of "
            "trees means that of each factor, not that of the matrix. Call lrjax.add(x, y) "
            "for a sum, lrjax.LowRank(2 * x.left, x.right) for a multiple, x @ v or "
            "x.matvec(v) for products, and x.materialize() for the dense matrix."
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __neg__ = _refuse
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = _refuse
