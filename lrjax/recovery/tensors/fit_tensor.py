import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, ArrayLike

from ..._progress import Meter
from ...linalg import nonzero, working_dtype
from ...lowrank import unfolded_svd
from .._inputs import as_mask, as_numbers, check_not_negative, check_width
from .._median import observed_medians
from ..derivatives import refuse_derivatives
from ..fill_in import fill_in
from .tensor_fit import TensorFit, assemble
from .thresholded import Path, follow, median, norm, relative_norm


WIDEST = 40  # default of the largest rank of an axis
LEVEL = 1.4  # threshold of an unfolding, in units of sqrt(observed · longer side) / penalty
FAST, SLOW = 1.5, 1.05  # growth of the penalty where the constraint, or L, is behind
PATIENCE = 120  # steps after which it grows fast in any case
FALL = 0.25  # growth of the penalty of a completion less one, by the observed share
HELD_OUT, MOST_HELD_OUT = 0.1, 3000  # share and number of entries that judge the steps
NO_DERIVATIVE = (
    "{} has no derivative: it decides on ranks. Hold the fit constant with "
    "jax.lax.stop_gradient."
)


def fit_robust_tensor(
    tensor: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    ranks: Sequence[int] | None = None,
    tol: ArrayLike = 1e-6,
    max_steps: int = 200,
    progress: bool = False,
) -> TensorFit:
    """Robust tensor PCA: a tensor taken apart into a low-rank part and gross errors.

    The augmented Lagrangian of :func:`lrjax.fit_robust_pca`, with all unfoldings in the
    place of one matrix, and a hard threshold: with ``C = tensor − S + Λ/μ``

        U_k ← left singular vectors of unfolding k of C with values above c_k/μ,
        L ← C ×_1 U_1U_1ᵀ … ×_d U_dU_dᵀ,   R ← tensor − L + Λ/μ,
        Λ ← μ clip(R, ± 1/μ),   S ← R − Λ/μ,   μ ← growth · μ,

    ``c_k = 1.4 sqrt(observed fraction · longer side of unfolding k)``, and beside L the
    mean of C − L over what is observed, a center of the entries. What is of low rank in
    every unfolding at once is held by all of them: more errors can be told from it than by
    any unfolding alone, and more than by the sum of their nuclear norms.

    Told nothing: a few entries are held out, the thresholds fall, and the step that
    predicts them best is where they stop in a second turn with all entries. Data without
    noise are followed to the tolerance. A fit of ``a X + c`` is ``a`` times that of ``X``,
    plus ``c``. Pure: jit it (``ranks``, ``max_steps`` static),
    ``vmap`` it. A step costs a Gram matrix and an eigendecomposition ``(n_k, n_k)`` for
    each axis.

    Args:
        tensor: real ``(n_1, …, n_d)``, d ≥ 2. What is not finite counts as missing.
        mask: boolean, true where an entry is observed.
        ranks: the largest rank of each axis; by default 40 or its length.
        tol: stop when the parts explain the observed tensor to this relative residual.
        max_steps: at most as many iterations in each of the two turns.
        progress: show a progress bar with the residual for each turn, as
            :func:`lrjax.solve` does.

    Returns:
        A :class:`TensorFit`.

    Raises:
        ValueError: for a tensor without entries or of less than two axes, a mask that does
            not fit, ranks out of range, a negative tolerance; where it is differentiated.
        TypeError: for what is not made of numbers.
        ImportError: with ``progress`` where tqdm is not installed.

    Example:
        >>> import jax, lrjax
        >>> from lrjax.lowrank import TuckerForm
        >>> keys = jax.random.split(jax.random.key(0), 5)
        >>> factors = [jax.random.normal(k, (12, 2)) for k in keys[:3]]
        >>> clean = TuckerForm(jax.random.normal(keys[3], (2, 2, 2)), factors).materialize()
        >>> wrong = jax.random.bernoulli(keys[4], 0.1, clean.shape)
        >>> fit = lrjax.recovery.fit_robust_tensor(clean + 20 * wrong)
        >>> fit.ranks.tolist(), bool(abs(fit.low_rank.materialize() - clean).max() < 1e-2)
        ([2, 2, 2], True)

    Reference:
        H. Dong, T. Tong, C. Ma, Y. Chi, "Fast and provable tensor robust principal
        component analysis via scaled gradient descent" (2023), arXiv 2206.09109, for the
        problem and falling thresholds; D. Goldfarb, Z. Qin, "Robust low-rank tensor
        recovery: models and algorithms" (2014), arXiv 1311.6182, for the Lagrangian.
    """
    name = "fit_robust_tensor"
    meter = Meter(f"lrjax.recovery.{name}", max_steps, "residual") if progress else None
    data, known, widths, tol = _checked(name, tensor, mask, ranks, tol)
    return _separate(data, known, tol, widths=widths, max_steps=max_steps, meter=meter)


# Compiled once for tensors of one shape: fits are also called outside of jit, again and
# again.
@functools.partial(jax.jit, static_argnames=("widths", "max_steps", "meter"))
def _separate(
    data: Array,
    known: Array,
    tol: Array,
    *,
    widths: tuple[int, ...],
    max_steps: int,
    meter: Meter | None,
) -> TensorFit:
    """The separation of a tensor that is checked."""
    origin, data = _centered(data, known)
    data, start, unit = _in_units(data, known)
    scales, penalty = _first_levels(start, known)

    def run(seen: Array, last: Array) -> Path:
        def rule(low_rank, change, memory, penalty):
            clipped, growth, steps = memory
            before = clipped / growth
            bound = jnp.where(seen, 1 / penalty, 0)
            clipped = jnp.clip(data - low_rank + before, -bound, bound)
            residual = relative_norm(clipped - before, data)
            settled = residual <= relative_norm(change, clipped)
            growth = jnp.where(settled & (steps < PATIENCE), SLOW, FAST)
            # At the last penalty it does not grow.
            growth = jnp.minimum(growth, jnp.maximum(last / penalty, 1)).astype(bound.dtype)
            cleaned = low_rank - before + (1 + 1 / growth) * clipped
            return cleaned, (clipped, growth, steps + 1), growth, residual

        memory = jnp.zeros_like(data), jnp.full((), FAST, data.dtype)
        memory = (*memory, jnp.zeros((), jnp.int32))
        held = known & ~seen
        return follow(
            start,
            memory,
            penalty,
            scales,
            widths,
            rule,
            seen,
            held,
            data,
            last=last,
            tol=tol,
            max_steps=max_steps,
            meter=meter,
        )

    path, error, steps = _two_turns(run, known, data)
    rest = jnp.where(known, data - path.whole, 0)
    # What was clipped is an error; the rest is noise, or rounding.
    clipped, growth, _ = path.memory
    sparse = jnp.where(jnp.abs(clipped) > 0.999 * growth / path.penalty, rest, 0)
    return assemble(path, sparse, rest - sparse, data, origin, unit, tol, error, steps)


def fit_tensor_completion(
    tensor: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    ranks: Sequence[int] | None = None,
    tol: ArrayLike = 1e-6,
    max_steps: int = 1000,
    progress: bool = False,
) -> TensorFit:
    """Complete a tensor of low multilinear rank, of which some entries are known.

    Gradient steps and hard thresholds that fall, the slower the less is observed. With
    ``P`` the observed places and p their share,

        C = L + P(tensor − L),   U_k ← vectors of unfolding k of C with values above c_k/μ,
        L ← C ×_1 U_1U_1ᵀ … ×_d U_dU_dᵀ,   μ ← (1 + p/4) μ,

    and a center beside L, as in :func:`fit_robust_tensor`.

    Told nothing: a few entries are held out, and where they are predicted best the
    thresholds stop in a second turn with all entries. So the ranks follow from the noise;
    data without noise are followed to the tolerance. Gross errors are for
    :func:`fit_robust_tensor`, which takes missing entries, too.

    Args:
        tensor: real ``(n_1, …, n_d)``, d ≥ 2. What is not finite counts as missing.
        mask: boolean, true where an entry is observed.
        ranks: the largest rank of each axis; by default 40 or its length.
        tol: stop when the observed entries are explained to this relative residual.
        max_steps: at most as many iterations in each of the two turns.
        progress: show a progress bar with the residual for each turn, as
            :func:`lrjax.solve` does.

    Returns:
        A :class:`TensorFit`.

    Raises:
        ValueError: as :func:`fit_robust_tensor`.
        TypeError: for what is not made of numbers.
        ImportError: with ``progress`` where tqdm is not installed.

    Example:
        >>> import jax, lrjax
        >>> from lrjax.lowrank import TuckerForm
        >>> keys = jax.random.split(jax.random.key(0), 5)
        >>> factors = [jax.random.normal(k, (12, 2)) for k in keys[:3]]
        >>> clean = TuckerForm(jax.random.normal(keys[3], (2, 2, 2)), factors).materialize()
        >>> seen = jax.random.bernoulli(keys[4], 0.4, clean.shape)
        >>> fit = lrjax.recovery.fit_tensor_completion(clean, mask=seen)
        >>> fit.ranks.tolist(), bool(abs(fit.low_rank.materialize() - clean).max() < 1e-2)
        ([2, 2, 2], True)

    Reference:
        T. Tong, C. Ma, A. Prater-Bennette, E. Tripp, Y. Chi, "Scaling and scalability:
        provable nonconvex low-rank tensor estimation from incomplete measurements" (2022),
        arXiv 2104.14526, for the problem; H. Rauhut, R. Schneider, Ž. Stojanac, "Low rank
        tensor recovery via iterative hard thresholding" (2017), arXiv 1602.05217, for the
        steps.
    """
    name = "fit_tensor_completion"
    meter = Meter(f"lrjax.recovery.{name}", max_steps, "residual") if progress else None
    data, known, widths, tol = _checked(name, tensor, mask, ranks, tol)
    return _complete(data, known, tol, widths=widths, max_steps=max_steps, meter=meter)


@functools.partial(jax.jit, static_argnames=("widths", "max_steps", "meter"))
def _complete(
    data: Array,
    known: Array,
    tol: Array,
    *,
    widths: tuple[int, ...],
    max_steps: int,
    meter: Meter | None,
) -> TensorFit:
    """The completion of a tensor that is checked."""
    origin, data = _centered(data, known)
    share = _share_of(known, data.dtype)
    unit = nonzero(norm(data) / jnp.sqrt(share * known.size))
    data = data / unit
    start = data / share
    scales, penalty = _first_levels(start, known)

    def run(seen: Array, last: Array) -> Path:
        part = _share_of(seen, data.dtype)

        def rule(low_rank, change, memory, penalty):
            gap = jnp.where(seen, data - low_rank, 0)
            return low_rank + gap, memory, 1 + FALL * part, relative_norm(gap, data)

        held = known & ~seen
        begin = jnp.where(seen, data, 0) / part
        return follow(
            begin,
            None,
            penalty,
            scales,
            widths,
            rule,
            seen,
            held,
            data,
            last=last,
            tol=tol,
            max_steps=max_steps,
            meter=meter,
        )

    path, error, steps = _two_turns(run, known, data)
    rest = jnp.where(known, data - path.whole, 0)
    nothing = jnp.zeros_like(rest)
    return assemble(path, nothing, rest, data, origin, unit, tol, error, steps)


def _checked(
    owner: str, tensor: Any, mask: Any, ranks: Sequence[int] | None, tol: Any
) -> tuple[Array, Array, tuple[int, ...], Array]:
    """The tensor with zeros for what is missing, the mask, the widths and the tolerance."""
    check_not_negative(owner, tol=tol)
    x = as_numbers(owner, tensor, "the tensor")
    if x.ndim < 2 or 0 in x.shape:
        raise ValueError(
            f"{owner} needs a tensor with two axes or more and with entries, got shape "
            f"{x.shape}."
        )
    x = jnp.asarray(x)
    x = x.astype(working_dtype(jnp.result_type(x.dtype, jnp.float32)))
    x, tol = refuse_derivatives(NO_DERIVATIVE.format(owner), (x, tol))
    seen = jnp.isfinite(x)
    if mask is not None:
        seen = seen & as_mask(owner, mask, x.shape)
    if ranks is None:
        ranks = [min(WIDEST, n) for n in x.shape]
    elif len(ranks) != x.ndim:
        raise ValueError(f"{owner} needs a rank for each of {x.ndim} axes, got {ranks}.")
    widths = tuple(
        check_width(owner, r, n, x.shape) for r, n in zip(ranks, x.shape, strict=True)
    )
    return jnp.where(seen, x, 0), seen, widths, jnp.asarray(tol, x.dtype)


def _centered(tensor: Array, mask: Array) -> tuple[Array, Array]:
    """The median of what is observed, and the tensor without it."""
    origin = observed_medians(tensor, mask).reshape(())
    return origin, jnp.where(mask, tensor - origin, 0)


def _in_units(tensor: Array, mask: Array) -> tuple[Array, Array, Array]:
    """Tensor and first guess without outliers, both in units of the guess; the units."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    guess = fill_in(rows, mask.reshape(rows.shape)).reshape(tensor.shape)
    unit = nonzero(jnp.sqrt(jnp.mean(guess * guess)))
    return tensor / unit, guess / unit, unit


def _first_levels(start: Array, mask: Array) -> tuple[Array, Array]:
    """The scales of the thresholds, and a penalty at which most is cut."""
    values, _ = unfolded_svd(start)
    share = _share_of(mask, start.dtype)
    longer = jnp.array([max(n, start.size // n) for n in start.shape], start.dtype)
    scales = LEVEL * jnp.sqrt(share * longer)
    return scales, 1.25 * jnp.max(scales / nonzero(jnp.stack([v[0] for v in values])))


def _share_of(mask: Array, dtype: Any) -> Array:
    """The share of the entries that are observed, or of one if none is."""
    return jnp.maximum(jnp.mean(mask, dtype=dtype), 1 / mask.size)


def _two_turns(
    run: Callable[[Array, Array], Path], mask: Array, tensor: Array
) -> tuple[Path, Array, Array]:
    """Run without the entries held out, then with all to the penalty that was best.

    Returns:
        What the second turn ends with; the error at the entries held out, of the first or
        of the second turn, if it is larger; the steps of both.
    """
    share = jnp.minimum(HELD_OUT, MOST_HELD_OUT / mask.size)
    held = mask & jr.bernoulli(jr.key(0), share, mask.shape)

    def turn(carry, _):
        path = run(carry[1], carry[2])
        return (path, mask, path.best), (path.error, path.steps)

    shapes = jax.eval_shape(run, mask, jnp.zeros((), jnp.float32))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    first = nothing, mask & ~held, jnp.full_like(nothing.best, jnp.inf)
    (path, _, _), (errors, steps) = lax.scan(turn, first, None, length=2)
    again = median(jnp.where(held, jnp.abs(tensor - path.whole), 0), jnp.sum(held))
    return path, jnp.maximum(errors[0], again), jnp.sum(steps)
