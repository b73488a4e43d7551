"""Every recipe for factor pairs, as a user calls it, against explicit matrices.

As in test_against_references.py all defaults are written down again here.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrjax

from ..helpers import relative_error
from ..reference import dense, factor_pairs as ref
from ..reference.rank_adaptive import AFLoRA
from ..reference.whitened_moments import MatrixAdam


STEPS, TOLERANCE = 20, 1e-9


class Direction:
    """The direction of each step, before the learning rate and its sign.

    ``rule(pairs, slopes, value, t)`` gives it for the pairs; other leaves keep their
    gradient. ``length(pair slopes, pair steps, bias slope, bias step, value)`` scales all.
    """

    def __init__(self, rule, length=None):
        self.rule, self.length = rule, length

    def __call__(self, pairs, slopes, bias, value, t):
        steps, factor = self.rule(pairs, slopes, value), 1.0
        if self.length is not None:
            dual = ref.inner(slopes, steps) + np.sum(bias * bias)
            factor = self.length(value) / dual
        return [(factor * a, factor * b) for a, b in steps], factor * bias


def gap_to(f_min):
    """Polyak's step for a known smallest loss."""
    return lambda value: max(value - f_min, 0)


def search():
    return ref.LevelSearch(0.1, 3.0, 0.5, 1.5).distance


def toward_level(rule):
    """Polyak's step towards a searched level, whose distance the damping follows too."""
    distance, direction = search(), Direction(rule, lambda gap: gap)

    def step(pairs, slopes, bias, value, t):
        return direction(pairs, slopes, bias, distance(value), t)

    return step


def scaled(damping, relative=True, *, power=0.0, f_min=0.0, weight=0.0):
    def rule(pairs, slopes, value):
        slopes = ref.penalized(pairs, slopes, weight)
        size = damping * max(value - f_min, 0) ** power
        return ref.scaled(pairs, slopes, damping=size, relative=relative)

    return rule


def gauss_newton(damping, *, power=0.0, f_min=0.0):
    def rule(pairs, slopes, value):
        size = damping * max(value - f_min, 0) ** power
        return ref.gauss_newton(pairs, slopes, damping=size)

    return rule


def unit(rule, weight=0.0):
    """Each pair by itself of length one in the metric of its preconditioner."""

    def normalized(pairs, slopes, value):
        penalized = ref.penalized(pairs, slopes, weight)
        return ref.unit_length(penalized, rule(pairs, slopes, value))

    return normalized


class LoraMuon:
    """Momentum of the factors, whitened and orthogonalized; Adam for the rest."""

    def __init__(self, decay, damping):
        self.decay, self.damping, self.momenta = decay, damping, None
        self.adam = dense.Adam(0.9, 0.999, 1e-8)

    def __call__(self, pairs, slopes, bias, value, t):
        old = self.momenta or [(0.0, 0.0)] * len(slopes)
        self.momenta = [
            (self.decay * m_left + g_left, self.decay * m_right + g_right)
            for (m_left, m_right), (g_left, g_right) in zip(old, slopes, strict=True)
        ]
        steps = ref.whitened_polar(pairs, self.momenta, damping=self.damping)
        return steps, self.adam.step(bias)


class AdamOfFactors:
    """Adam of each factor, of what ``first`` makes of the gradients; then decay."""

    def __init__(
        self, b1=0.9, b2=0.999, eps=1e-8, *, first=None, ratio=1.0, weight_decay=0.0
    ):
        new = lambda: dense.Adam(b1, b2, eps)
        self.left, self.right = ([new() for _ in "abc"] for _ in "lr")
        self.bias, self.first = new(), first
        self.ratio, self.weight_decay = ratio, weight_decay

    def __call__(self, pairs, slopes, bias, value, t):
        slopes = slopes if self.first is None else self.first(pairs, slopes, value)
        steps = []
        for i, ((left, right), (a, b)) in enumerate(zip(pairs, slopes, strict=True)):
            p_left = self.left[i].step(a) + self.weight_decay * left
            p_right = self.right[i].step(b) + self.weight_decay * right
            steps.append((self.ratio * p_left, p_right))
        return steps, self.bias.step(bias)


class TangentMomentum:
    """Momentum of the steps along the projected gradient, in units of the scale."""

    def __init__(self, decay, scale):
        self.decay, self.scale = decay, scale
        self.steps, self.bias = None, 0.0

    def __call__(self, pairs, slopes, bias, value, t):
        new = [
            (a / self.scale**2, b / self.scale**2)
            for a, b in map(ref.along_tangent, pairs, slopes)
        ]
        old = self.steps or [(0.0, 0.0)] * len(new)
        self.steps = [
            tuple(self.decay * m + p for m, p in zip(ms, ps, strict=True))
            for ms, ps in zip(old, new, strict=True)
        ]
        self.bias = self.decay * self.bias + bias
        return self.steps, self.bias


class AdamAndMore:
    """Adam of each factor, and what is made of its directions at a pair."""

    def __init__(self, more, first=None):
        self.adam, self.more = AdamOfFactors(first=first), more

    def __call__(self, pairs, slopes, bias, value, t):
        steps, bias_step = self.adam(pairs, slopes, bias, value, t)
        steps = [self.more(*x, p) for x, p in zip(pairs, steps, strict=True)]
        return steps, bias_step


def pulled(strength, ratio=None):
    def more(left, right, step):
        pull = ref.imbalance_pull(left, right, strength, ratio)
        return step[0] + pull[0], step[1] + pull[1]

    return more


def by_rows(most):
    return lambda left, right, step: ref.by_row_norms(left, right, step, most)


class Freezing:
    """Adam with decay, until the factors stop, each at its time."""

    def __init__(self, rate, decay, begin, end, window):
        self.adam, self.rate, self.decay = AdamOfFactors(), rate, decay
        self.begin, self.end = begin, end
        self.pruner = AFLoRA(6, window=window)

    def __call__(self, pairs, slopes, bias, value, t):
        steps, bias_step = self.adam(pairs, slopes, bias, value, t)
        flat = lambda both: [x for pair in both for x in pair]
        moves = [
            (p + self.decay * x) * (not frozen)
            for p, x, frozen in zip(
                flat(steps), flat(pairs), self.pruner.frozen, strict=True
            )
        ]
        new = [x - self.rate * p for x, p in zip(flat(pairs), moves, strict=True)]
        done = np.clip((t - self.begin) / (self.end - self.begin), 0, 1)
        self.pruner.step(t, new, flat(slopes), (1 - done) ** 3)
        return list(zip(moves[::2], moves[1::2], strict=True)), bias_step


class AltLora:
    """One factor a step: its projected gradient, momentum of the product, then decay."""

    def __init__(self, b1, *, scale=1.0, weight_decay=0.0):
        self.b1, self.scale, self.weight_decay = b1, scale, weight_decay
        self.products, self.bias = {}, 0.0

    def moment(self, key, p, partner):
        """The mean of what the steps would do to the product, as far as they can now."""
        before = self.products.get(key)
        # What the partner of now makes closest to it.
        m = 0.0 if before is None else before @ np.linalg.pinv(partner).T
        m = self.b1 * m + (1 - self.b1) * p
        self.products[key] = m @ partner.T
        return m

    def __call__(self, pairs, slopes, bias, value, t):
        steps = []
        for i, (pair, gs) in enumerate(zip(pairs, slopes, strict=True)):
            own, other = (0, 1) if t % 2 == 0 else (1, 0)
            partner = pair[other]
            p = gs[own] @ np.linalg.inv(partner.T @ partner) / self.scale**2
            moved = self.direction((i, own), p, partner, t)
            step = [np.zeros_like(x) for x in pair]
            step[own] = moved + self.weight_decay * pair[own]
            steps.append(tuple(step))
        return steps, self.other(bias)

    def direction(self, key, p, partner, t):
        return self.moment(key, p, partner)

    def other(self, bias):
        self.bias = self.b1 * self.bias + (1 - self.b1) * bias
        return self.bias


class AltLoraPlus(AltLora):
    """Over the root of a mean of squares, both of them corrected for their age."""

    def __init__(self, b1=0.9, b2=0.999, eps=1e-8, **settings):
        super().__init__(b1, **settings)
        self.b2, self.eps, self.squares = b2, eps, {}
        self.adam = dense.Adam(b1, b2, eps)

    def direction(self, key, p, partner, t):
        age = t // 2 + 1
        v = self.b2 * self.squares.get(key, 0.0) + (1 - self.b2) * p**2
        self.squares[key] = v
        m = self.moment(key, p, partner) / (1 - self.b1**age)
        return m / (np.sqrt(v / (1 - self.b2**age)) + self.eps)

    def other(self, bias):
        return self.adam.step(bias)


class LoraRite:
    """Matrix moments of gradients in the frames of the partners, clipped together."""

    def __init__(self, b1=0.9, b2=0.999, eps=1e-6, most=1.0, conserve=False, decay=0.0):
        self.moments = [[MatrixAdam(b1, b2, eps, conserve) for _ in "lr"] for _ in range(3)]
        self.bias, self.most, self.decay = dense.Adam(b1, b2, eps), most, decay

    def __call__(self, pairs, slopes, bias, value, t):
        def in_frame(g, partner):
            return g @ np.linalg.inv(np.linalg.qr(partner)[1])

        sizes = [
            np.sum(in_frame(g, partner) ** 2)
            for (left, right), gs in zip(pairs, slopes, strict=True)
            for g, partner in zip(gs, (right, left), strict=True)
        ]
        share = min(1.0, self.most / np.sqrt(sum(sizes)))
        steps = [
            (
                moments[0](share * a, right) + self.decay * left,
                moments[1](share * b, left) + self.decay * right,
            )
            for moments, (left, right), (a, b) in zip(
                self.moments, pairs, slopes, strict=True
            )
        ]
        return steps, self.bias.step(bias)


class InTurns:
    """A reference for each factor that only sees its own turns."""

    def __init__(self, make):
        self.turns, self.bias = (make(), make()), make()

    def __call__(self, pairs, slopes, bias, value, t):
        steps, _ = self.turns[t % 2](pairs, slopes, bias, value, t // 2)
        only = lambda step: tuple(p * (side == t % 2) for side, p in enumerate(step))
        return [only(step) for step in steps], self.bias(pairs, slopes, bias, value, t)[1]


def plainly(pair, step, t):
    return pair[0] + step[0], pair[1] + step[1]


def balancing(pair, step, t):
    return ref.balanced(*plainly(pair, step, t))


def nearest(every):
    """Balanced at the end of each period."""

    def move(pair, step, t):
        moved = plainly(pair, step, t)
        return moved if (t + 1) % every else ref.nearest_balanced(*moved)

    return move


def riemannian(every):
    """Exact at the end of each period."""

    def move(pair, step, t):
        exact = (t + 1) % every == 0
        return ref.riemannian(*pair, *step) if exact else plainly(pair, step, t)

    return move


@dataclasses.dataclass
class Case:
    """A recipe and its reference.

    Attributes:
        make: the optimizer.
        direction: makes a reference with a memory of its own.
        rate: the learning rate.
        move: how the step ``(−η P_l, −η P_r)`` moves a pair.
        steps: how many.
        products: whether the products are compared alone, the factors being free.
    """

    make: Callable[[], Any]
    direction: Callable[[], Any]
    rate: float
    move: Callable = plainly
    steps: int = STEPS
    products: bool = False


CASES = {
    "scaled_gd": Case(lambda: lrjax.scaled_gd(), lambda: Direction(scaled(0.0)), 0.5),
    "scaled_gd(damped)": Case(
        lambda: lrjax.scaled_gd(0.1, damping=0.3, relative=False),
        lambda: Direction(scaled(0.3, False)),
        0.1,
    ),
    "prec_gd": Case(
        lambda: lrjax.prec_gd(), lambda: Direction(scaled(1.0, False, power=0.5)), 0.5
    ),
    "prec_gd(f_min)": Case(
        lambda: lrjax.prec_gd(0.1, damping=2.0, f_min=1.0),
        lambda: Direction(scaled(2.0, False, power=0.5, f_min=1.0)),
        0.1,
    ),
    "scaled_subgradient": Case(
        lambda: lrjax.scaled_subgradient(), lambda: Direction(unit(scaled(0.0))), 1.0
    ),
    "scaled_subgradient(polyak)": Case(
        lambda: lrjax.scaled_subgradient(f_min=1.0, damping=0.1),
        lambda: Direction(scaled(0.1), gap_to(1.0)),
        1.0,
    ),
    "scaled_subgradient(search)": Case(
        lambda: lrjax.scaled_subgradient(0.5, f_min="search"),
        lambda: Direction(scaled(0.0), search()),
        0.5,
    ),
    "opsa": Case(lambda: lrjax.opsa(f_min=None), lambda: Direction(unit(scaled(0.1))), 1.0),
    "opsa(regularized)": Case(
        lambda: lrjax.opsa(
            0.1, f_min=None, nuclear_weight=0.2, damping=0.3, relative=False
        ),
        lambda: Direction(unit(scaled(0.3, False, weight=0.2), 0.2)),
        0.1,
    ),
    "opsa(polyak)": Case(
        lambda: lrjax.opsa(f_min=1.0),
        lambda: Direction(scaled(0.1, power=1.0, f_min=1.0), gap_to(1.0)),
        1.0,
    ),
    "opsa(search)": Case(
        lambda: lrjax.opsa(), lambda: toward_level(scaled(0.1, power=1.0)), 1.0
    ),
    "opsa(rebalance)": Case(
        lambda: lrjax.opsa(0.1, f_min=None, rebalance=True),
        lambda: Direction(unit(scaled(0.1))),
        0.1,
        balancing,
        products=True,
    ),
    "levenberg_marquardt": Case(
        lambda: lrjax.levenberg_marquardt(),
        lambda: Direction(unit(gauss_newton(1e-2))),
        1.0,
    ),
    "levenberg_marquardt(polyak)": Case(
        lambda: lrjax.levenberg_marquardt(0.5, f_min=1.0, damping=0.1, loss_power=0.5),
        lambda: Direction(gauss_newton(0.1, power=0.5, f_min=1.0), gap_to(1.0)),
        0.5,
    ),
    "levenberg_marquardt(search)": Case(
        lambda: lrjax.levenberg_marquardt(f_min="search"),
        lambda: Direction(gauss_newton(1e-2), search()),
        1.0,
    ),
    "subgm": Case(
        lambda: lrjax.subgm(),
        lambda: Direction(lambda pairs, slopes, value: ref.subgm(pairs, slopes)),
        0.1,
    ),
    "lora_muon": Case(lambda: lrjax.lora_muon(0.1), lambda: LoraMuon(0.95, 1e-3), 0.1),
    "lora_muon(damped)": Case(
        lambda: lrjax.lora_muon(0.1, momentum=0.5, damping=0.3),
        lambda: LoraMuon(0.5, 0.3),
        0.1,
    ),
    "lora_plus": Case(
        lambda: lrjax.lora_plus(0.01), lambda: AdamOfFactors(ratio=16.0), 0.01
    ),
    "lora_plus(decay)": Case(
        lambda: lrjax.lora_plus(0.1, ratio=3.0, b1=0.8, b2=0.98, eps=0.1, weight_decay=0.2),
        lambda: AdamOfFactors(0.8, 0.98, 0.1, ratio=3.0, weight_decay=0.2),
        0.1,
    ),
    "lora_pro": Case(lambda: lrjax.lora_pro(0.05), lambda: TangentMomentum(0.9, 1.0), 0.05),
    "lora_pro(scale)": Case(
        lambda: lrjax.lora_pro(0.3, scale=2.0, momentum=0.5),
        lambda: TangentMomentum(0.5, 2.0),
        0.3,
    ),
    "scaled_adamw": Case(
        lambda: lrjax.scaled_adamw(0.01),
        lambda: AdamOfFactors(0.7, 0.8, first=scaled(1e-2, False)),
        0.01,
    ),
    "scaled_adamw(decay)": Case(
        lambda: lrjax.scaled_adamw(
            0.1, b1=0.9, b2=0.9, eps=0.1, damping=0.3, relative=True, weight_decay=0.2
        ),
        lambda: AdamOfFactors(0.9, 0.9, 0.1, first=scaled(0.3), weight_decay=0.2),
        0.1,
    ),
    "scaled_adamw(alternating)": Case(
        lambda: lrjax.scaled_adamw(0.1, order="alternating", weight_decay=0.2),
        lambda: InTurns(
            lambda: AdamOfFactors(0.7, 0.8, first=scaled(1e-2, False), weight_decay=0.2)
        ),
        0.1,
    ),
    "alt_lora": Case(lambda: lrjax.alt_lora(0.1), lambda: AltLora(0.9), 0.1),
    "alt_lora(scale)": Case(
        lambda: lrjax.alt_lora(0.3, scale=2.0, b1=0.5, weight_decay=0.2),
        lambda: AltLora(0.5, scale=2.0, weight_decay=0.2),
        0.3,
    ),
    "alt_lora_plus": Case(lambda: lrjax.alt_lora_plus(0.01), AltLoraPlus, 0.01),
    "alt_lora_plus(decay)": Case(
        lambda: lrjax.alt_lora_plus(0.1, b1=0.5, b2=0.9, eps=0.1, weight_decay=0.2),
        lambda: AltLoraPlus(0.5, 0.9, 0.1, weight_decay=0.2),
        0.1,
    ),
    "lora_rite": Case(lambda: lrjax.lora_rite(0.01), LoraRite, 0.01),
    "lora_rite(decay)": Case(
        lambda: lrjax.lora_rite(
            0.1, b1=0.5, b2=0.9, eps=0.1, max_norm=3.0, conserve=True, weight_decay=0.2
        ),
        lambda: LoraRite(0.5, 0.9, 0.1, 3.0, True, 0.2),
        0.1,
    ),
    "loro": Case(lambda: lrjax.loro(1e-3), AdamOfFactors, 1e-3, riemannian(500), steps=502),
    "loro(period)": Case(
        lambda: lrjax.loro(1e-2, exact_every=4), AdamOfFactors, 1e-2, riemannian(4)
    ),
    "ilora": Case(lambda: lrjax.ilora(1e-2), lambda: AdamAndMore(pulled(0.1)), 1e-2),
    "ilora(preconditioned)": Case(
        lambda: lrjax.ilora(1e-2, 0.3, ratio=0.7, damping=0.1),
        lambda: AdamAndMore(pulled(0.3, 0.7), scaled(0.1)),
        1e-2,
    ),
    "balora": Case(lambda: lrjax.balora(1e-2), AdamOfFactors, 1e-2, nearest(1)),
    "balora(period)": Case(
        lambda: lrjax.balora(1e-2, period=3), AdamOfFactors, 1e-2, nearest(3)
    ),
    "allora": Case(lambda: lrjax.allora(1e-2), lambda: AdamAndMore(by_rows(2.0)), 1e-2),
    "allora(most)": Case(
        lambda: lrjax.allora(1e-2, most=0.5), lambda: AdamAndMore(by_rows(0.5)), 1e-2
    ),
    "aflora": Case(
        lambda: lrjax.aflora(1e-2, begin=10, end=50),
        lambda: Freezing(1e-2, 0.1, 10, 50, window=10),
        1e-2,
        steps=60,
    ),
}


def problem(steps):
    """Factors, full gradients that are not theirs to influence, and values of a loss."""
    rng = np.random.default_rng(3)
    factor = lambda *shape: jnp.asarray(rng.normal(size=shape) + 2 * np.eye(*shape[-2:]))
    pair = lambda *batch: lrjax.LowRank(factor(*batch, 8, 3), factor(*batch, 6, 3))
    params = {"bias": rng.normal(size=4), "pair": pair(), "stack": pair(2)}
    slope = lambda *shape: rng.normal(size=shape) + 0.3 * rng.normal(size=(steps, *shape))
    full = {"bias": slope(4), "pair": slope(8, 6), "stack": slope(2, 8, 6)}
    values = 3 + 10 * 0.8 ** np.arange(steps) * rng.uniform(0.5, 1.5, steps)
    return params, full, values


@functools.partial(jax.jit, static_argnums=0)
def trajectory(tx, params, full, values):
    """The parameters after every step."""

    def step(carry, seen):
        params, state = carry
        slopes, value = seen
        through = lambda g, x: (
            lrjax.LowRank(g @ x.right, g.mT @ x.left) if lrjax.is_low_rank(x) else g
        )
        grads = {name: through(slopes[name], params[name]) for name in params}
        updates, state = tx.update(grads, state, params, value=value, grad=grads)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.lax.scan(step, (params, tx.init(params)), (full, values))[1]


@pytest.mark.slow_but(*(name for name in CASES if "(" not in name))
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, x64):
    case = CASES[name]
    params, full, values = problem(case.steps)
    tx = optax.with_extra_args_support(case.make())
    got = trajectory(tx, params, full, values)
    direction = case.direction()
    stack, bias = params["stack"], params["bias"]
    pairs = [(params["pair"].left, params["pair"].right)]
    pairs += list(zip(stack.left, stack.right, strict=True))
    for t, value in enumerate(values):
        gs = [full["pair"][t], *full["stack"][t]]
        slopes = [(g @ r, g.T @ l) for g, (l, r) in zip(gs, pairs, strict=True)]
        steps, bias_step = direction(pairs, slopes, full["bias"][t], value, t)
        pairs = [
            case.move(pair, (-case.rate * a, -case.rate * b), t)
            for pair, (a, b) in zip(pairs, steps, strict=True)
        ]
        bias = bias - case.rate * bias_step
        assert relative_error(got["bias"][t], bias) < TOLERANCE
        at = jax.tree.map(lambda x, t=t: x[t], got)
        lefts, rights = (
            [getattr(at["pair"], side), *getattr(at["stack"], side)]
            for side in ("left", "right")
        )
        for (left, right), l, r in zip(pairs, lefts, rights, strict=True):
            found, want = [l @ r.T], [left @ right.T]
            if not case.products:
                found, want = [*found, l, r], [*want, left, right]
            for x, y in zip(found, want, strict=True):
                assert relative_error(x, y) < TOLERANCE, f"step {t}"
