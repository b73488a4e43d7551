"""Every exported recipe, as a user calls it, against its slow dense reference.

The references know nothing of the library: all defaults are written down again in the
calls below, so that a change of one in a recipe is a failure here.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax

from ..helpers import relative_error
from ..reference import (
    dense,
    eight_bits,
    mofasgd as factored,
    momentum_methods as momenta,
    projected_adam as ref,
    psgd as curvature,
    soap as rotated,
    subset_norm,
)
from .test_factor_recipes import CASES as PAIR_CASES


RATE, DECAY = 1e-2, 0.1
ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
OTHER = {"b1": 0.8, "b2": 0.98, "eps": 1e-5}  # where the defaults are not asked for
SINGLE = {"tolerance": 2e-6}  # of Gaussian bases, and of Adafactor's decay

TREES = {
    "small": {"bias": (5,), "stack": (2, 8, 11), "tall": (12, 9), "wide": (8, 12)},
    "pair": {"bias": (5,), "stack": (2, 12, 9)},
    "tiny": {"bias": (5,), "wide": (8, 12)},
    "square": {"bias": (5,), "first": (8, 8), "stack": (2, 9, 9)},
    "medium": {"bias": (5,), "thin": (8, 12), "tall": (30, 20), "wide": (20, 32)},
    "large": {"bias": (5,), "tall": (136, 129), "wide": (8, 130)},
}
# Leaves that weight decay reaches.
DECAYED = ("first", "stack", "tall", "thin", "wide")


def gradients(tree, steps):
    """A fixed part and fresh noise, of a size that jumps, with singular values apart."""
    rng = np.random.default_rng(7)
    sizes = 0.03 * rng.choice([0.5, 1.0, 1.0, 1.0, 4.0], steps)

    def draw(shape):
        g = rng.normal(size=shape) + rng.normal(size=(steps, *shape))
        if len(shape) > 1:
            g = g * np.linspace(2, 0.5, shape[-2])[:, None] * np.linspace(1, 2, shape[-1])
        return g * sizes.reshape(steps, *(1 for _ in shape))

    return {name: draw(shape) for name, shape in TREES[tree].items()}


class Matrix(NamedTuple):
    """One matrix as its reference sees it.

    Attributes:
        grads: its gradients, with the shorter side first where the method has sides.
        stack: those of all matrices of its leaf.
        member: which of these it is.
        place: of the leaf among those that are treated.
        places: how many there are.
        tall: whether it has been transposed.
        adam: the settings of Adam.
    """

    grads: np.ndarray
    stack: list[np.ndarray]
    member: int
    place: int
    places: int
    tall: bool
    adam: dict[str, float]

    def due(self, period):
        return dense.staggered(period, self.place, self.places, len(self.grads))

    @property
    def sides(self):
        return self.grads.shape[1:]

    @property
    def key(self):
        """Random numbers depend on the key, the leaf and the step alone."""
        return jr.fold_in(jr.key(0), self.place)

    def normal(self, *shape):
        """Standard normal numbers of this leaf."""
        return np.asarray(jr.normal(self.key, shape))

    def normal_at(self, *shape):
        """The same, anew for each step."""
        return lambda t: np.asarray(jr.normal(jr.fold_in(self.key, t), shape))

    def gaussian_at(self, rank):
        """Independent N(0, 1/r) entries, in float32 whatever the gradients are."""
        draw = lambda t: jr.normal(
            jr.fold_in(self.key, t), (self.sides[0], rank), jnp.float32
        )
        return lambda t: np.asarray(draw(t) / rank**0.5, np.float64)


def oriented(a):
    """Left singular vectors with LAPACK's signs, as XLA calls it."""
    return np.asarray(jnp.linalg.svd(a, full_matrices=False)[0])


@dataclasses.dataclass
class Case:
    """A recipe and its reference.

    Attributes:
        make: the optimizer.
        matrix: the directions of a :class:`Matrix`, before decay, rate and sign.
        rest: those of every other leaf; Adam's by default.
        adam: the settings of Adam.
        decay: the weight decay.
        tree: the shapes.
        steps: how many; enough for the default period to end.
        sided: whether the method looks for the shorter side.
        chosen: the names of the leaves that are treated as matrices.
        scaled: what is made of the gradients of a whole leaf first.
        rate: of each step, if not constant.
        tolerance: larger where numbers are computed in float32 whatever the gradients are.
    """

    make: Callable[[], Any]
    matrix: Callable[[Matrix], np.ndarray]
    rest: Callable[[np.ndarray], np.ndarray] | None = None
    adam: dict[str, float] = dataclasses.field(default_factory=lambda: ADAM)
    decay: float = 0.0
    tree: str = "small"
    steps: int = 20
    sided: bool = True
    chosen: tuple[str, ...] = ("first", "stack", "tall", "wide")
    scaled: Callable[[np.ndarray], np.ndarray] = lambda g: g
    rate: Callable[[np.ndarray], np.ndarray] = lambda t: RATE + 0 * t
    tolerance: float = 1e-9


PERIOD = {"refresh_every": 4, "weight_decay": DECAY}
OTHER_PERIOD = {**PERIOD, **OTHER}
SIGNS = {"signs": oriented}


def galore(x, rank=2, period=200):
    return ref.galore(x.grads, x.due(period), rank=rank, scale=0.25, **x.adam, **SIGNS)


def randomized_galore(x):
    settings = {"rank": 2, "scale": 0.25, "sketch": sketch(x, 2)}
    return ref.randomized_galore(x.grads, x.due(4), **settings, **x.adam, **SIGNS)


def sketch(x, rank):
    """Gaussian columns, eight more than the rank."""
    return x.normal_at(x.sides[1], min(rank + 8, *x.sides))


def galore_plus(x, rank=2, period=200, fraction=0.01):
    shape = x.sides[::-1] if x.tall else x.sides
    count = max(1, round(fraction * np.prod(shape)))
    mask = ref.one_of_each_run(shape, fraction, np.asarray(jr.uniform(jr.key(0), (count,))))

    def drawn(t):
        return int(np.argmax(jr.uniform(jr.fold_in(x.key, t), (len(x.stack),))))

    return ref.galore_plus(
        x.stack,
        x.member,
        x.due(period),
        rank=rank,
        scale=0.25,
        entries=mask.T if x.tall else mask,
        sketch=sketch(x, rank),
        drawn=drawn,
        **x.adam,
        **SIGNS,
    )


def q_galore(x, period=200, block=256, store=lambda m, signed, t: m):
    return ref.q_galore(
        x.grads,
        period=period,
        threshold=0.4,
        rank=2,
        scale=0.25,
        block=block,
        store=(lambda m, *at: store(m.T, *at).T) if x.tall else store,
        **x.adam,
        **SIGNS,
    )


def stored(m, signed, t):
    return eight_bits.stored(m, signed, 8, t)


def grass(x, period=200):
    return ref.grass(x.grads, x.due(period), rank=2, scale=0.25, **x.adam)


def golore(x, period=200, switch_at=0):
    columns = x.normal_at(x.sides[0], 2)
    settings = {"rank": 2, "switch_at": switch_at, "columns": columns, "scale": 0.25}
    return ref.golore(x.grads, x.due(period), **settings, **x.adam)


def sara(x, period=200):
    def gumbel(t):
        return np.asarray(jr.gumbel(jr.fold_in(x.key, t), x.sides[:1]))

    settings = {"rank": 2, "gumbel": gumbel, "scale": 0.25}
    return ref.sara(x.grads, x.due(period), **settings, **x.adam, **SIGNS)


def coap(x, period=32, recalibrate=5):
    return ref.coap(
        x.grads,
        x.due(period),
        start=dense.signed_qr(x.normal(x.sides[0], 2)),
        period=period,
        recalibrate=recalibrate,
        step_size=0.1,
        scale=1.0,
        **x.adam,
    )


def online_subspace_descent(x, penalty=0.0, rate=lambda t: RATE + 0 * t):
    rates = 5.0 * rate(np.arange(len(x.grads)))
    settings = {"rank": 2, "rates": rates, "penalty": penalty}
    return ref.online_subspace_descent(x.grads, **settings, **x.adam)


def ldadam(x, rank=9, feedback=True):
    settings = {"rank": min(rank, *x.sides), "feedback": feedback}
    return ref.ldadam(x.grads, rho=x.adam["b1"], **settings, **x.adam)


LDADAM = {"adam": {"b1": 0.908, "b2": 0.99, "eps": 1e-8}}


def fira(x, period=200):
    settings = {"rank": 2, "scale": 0.25, "growth": 1.01}
    return ref.fira(x.grads, x.due(period), **settings, **x.adam, **SIGNS)


def frugal(x, period=200, residual=1.0):
    return ref.frugal(x.grads, x.due(period), rank=2, residual=residual, **x.adam)


def subtrack(x, period=200):
    settings = {"rank": 2, "step_size": 10.0, "scale": 0.25, "growth": 1.01}
    return ref.subtrack(x.grads, x.due(period), **settings, **x.adam, **SIGNS)


def subspace_adam(x, rank=2, blocks=8):
    start = dense.signed_qr(x.normal(x.sides[0], rank))
    return ref.subspace_adam(x.grads, start=start, blocks=blocks, growth=1.01, **x.adam)


def apollo(x, rank=2, period=200, scale=1.0, tensor=False):
    settings = {"scale": scale, "tensor": tensor, "growth": 1.01}
    basis = x.gaussian_at(rank)
    return ref.apollo(x.grads, x.due(period), basis=basis, **settings, **x.adam)


def sumo(x, period=200, growth=1.01):
    settings = {"rank": 2, "scale": 1.0, "decay": 0.95, "growth": growth}
    return momenta.sumo(x.grads, x.due(period), sketch=sketch(x, 2), **settings)


def flora(x, rank=9, period=1000):
    basis = x.gaussian_at(min(rank, *x.sides))
    return momenta.flora(x.grads, x.due(period), basis=basis, decay=0.9)


def adafactor(g):
    return momenta.adafactor(g, power=0.8, eps=1e-30, least=128, clip=1.0)


FLORA = {"rest": functools.partial(dense.average, decay=0.9), "scaled": adafactor, **SINGLE}


def adam_sn(x):
    return subset_norm.adam_sn(x.grads, **x.adam)


def snsm(x, rank=9, period=200):
    return subset_norm.snsm(x.grads, x.due(period), rank=min(rank, *x.sides), **x.adam)


def dion(x, rank, orthonormal=False):
    start = x.normal(x.sides[1], rank)
    return momenta.dion(x.grads, start=start, decay=0.95, orthonormal=orthonormal)


def dion2(x, fraction=0.25, decay=0.95):
    m, n = x.sides
    count = -int(-fraction * min(m, n) // 1)
    return momenta.dion2(x.grads, count=count, decay=decay, over_rows=m <= n)


def dion3(x, fraction=0.25, b2=0.95, eps=1e-8):
    count = -int(-fraction * x.sides[0] // 1)
    numbers = {"decay": 0.95, "b2": b2, "eps": eps}
    return momenta.dion2(x.grads, count=count, over_rows=True, **numbers)


def muon(x, decay=0.95, nesterov=True):
    ahead = dense.momentum(x.grads, decay=decay, nesterov=False)
    if nesterov:
        ahead = x.grads + decay * ahead
    m, n = x.sides
    return np.stack([max(1, m / n) ** 0.5 * dense.polar(a) for a in ahead])


def normuon(x, decay=0.95, b2=0.95, eps=1e-8, rms=0.2):
    return momenta.normuon(x.grads, decay=decay, b2=b2, eps=eps, rms=rms)


def power_sgd(x, rank=4):
    return momenta.power_sgd(x.grads, start=x.normal(x.sides[1], rank), decay=0.9)


POWER_SGD = {
    "rest": functools.partial(dense.momentum, decay=0.9, nesterov=True),
    "sided": False,
}


def mofasgd(x, rank=9):
    return factored.mofasgd(x.grads, min(rank, *x.sides), decay=0.95)[0]


def psgd_kron(x, decay=0.9, rate=0.1, clip=1.1, max_side=8192):
    numbers = {"rate": rate, "damping": 1e-9, "clip": clip}
    diagonal = [side > max_side for side in x.sides]
    return curvature.kron(x.grads, decay=decay, diagonal=diagonal, **numbers)


def soap(x, period=10, right=True):
    lead = x.place * period // x.places
    settings = {"b1": 0.95, "b2": 0.95, "eps": 1e-8}
    return np.stack(rotated.soap(x.grads, every=period, lead=lead, right=right, **settings))


def soap_rest(g):
    """The first gradient only sets the bases, and Adam does not see it."""
    later = dense.adam(g[1:], b1=0.95, b2=0.95, eps=1e-8)
    return np.concatenate([np.zeros_like(g[:1]), later])


NUMBERS = {"refresh_every": 4, "b1": 0.5, "b2": 0.9, "weight_decay": DECAY}


def kl_shampoo(x, period=10, eps=1e-8, max_side=10000):
    numbers = {"b1": 0.9, "b2": 0.98} if period == 10 else {"b1": 0.5, "b2": 0.9}
    lead = x.place * period // x.places
    rotated_sides = [side <= max_side for side in x.sides]
    return rotated.kl_shampoo(
        x.grads, sides=rotated_sides, every=period, lead=lead, eps=eps, **numbers
    )


def normal_like(key, tree, *last):
    """Standard normal numbers for each leaf, by its number, as one vector."""
    draws = [
        jr.normal(jr.fold_in(key, i), (*shape, *last), jnp.float64)
        for i, shape in enumerate(tree.values())
    ]
    return np.concatenate([np.asarray(x).reshape(-1, *last) for x in draws])


def falling(t):
    return RATE / (1 + t)


CASES = {
    "galore": Case(lambda: lrjax.galore(RATE), galore, steps=210),
    "galore(period)": Case(
        lambda: lrjax.galore(RATE, 3, **OTHER_PERIOD),
        lambda x: galore(x, rank=3, period=4),
        decay=DECAY,
        adam=OTHER,
        tree="pair",
    ),
    "galore(randomized)": Case(
        lambda: lrjax.galore(RATE, method="randomized", **OTHER_PERIOD),
        randomized_galore,
        decay=DECAY,
        adam=OTHER,
        tree="pair",
    ),
    "galore_plus": Case(lambda: lrjax.galore_plus(RATE), galore_plus, steps=210),
    "galore_plus(period)": Case(
        lambda: lrjax.galore_plus(RATE, fraction=0.25, **OTHER_PERIOD),
        lambda x: galore_plus(x, period=4, fraction=0.25),
        decay=DECAY,
        adam=OTHER,
        tree="pair",
    ),
    "q_galore": Case(lambda: lrjax.q_galore(RATE), q_galore, steps=210),
    "q_galore(period)": Case(
        lambda: lrjax.q_galore(
            RATE, refresh_every=2, block=8, min_size=1, weight_decay=DECAY, **OTHER
        ),
        lambda x: q_galore(x, period=2, block=8, store=stored),
        functools.partial(ref.stored_adam, store=stored, **OTHER),
        decay=DECAY,
        adam=OTHER,
        steps=30,
        tree="pair",
    ),
    "grass": Case(lambda: lrjax.grass(RATE), grass, steps=210),
    "grass(period)": Case(
        lambda: lrjax.grass(RATE, **OTHER_PERIOD),
        lambda x: grass(x, 4),
        decay=DECAY,
        adam=OTHER,
        tree="pair",
    ),
    "golore": Case(lambda: lrjax.golore(RATE), golore, steps=210),
    "golore(switch)": Case(
        lambda: lrjax.golore(RATE, switch_at=8, **OTHER_PERIOD),
        lambda x: golore(x, 4, switch_at=8),
        decay=DECAY,
        adam=OTHER,
        tree="pair",
    ),
    "sara": Case(lambda: lrjax.sara(RATE), sara, steps=210),
    "sara(period)": Case(
        lambda: lrjax.sara(RATE, **OTHER_PERIOD),
        lambda x: sara(x, 4),
        decay=DECAY,
        adam=OTHER,
        tree="pair",
    ),
    "coap": Case(lambda: lrjax.coap(RATE), coap, steps=200),
    "coap(period)": Case(
        lambda: lrjax.coap(RATE, recalibrate=3, **OTHER_PERIOD),
        lambda x: coap(x, 4, recalibrate=3),
        decay=DECAY,
        adam=OTHER,
        tree="pair",
    ),
    "online_subspace_descent": Case(
        lambda: lrjax.online_subspace_descent(RATE), online_subspace_descent
    ),
    "online_subspace_descent(schedule)": Case(
        lambda: lrjax.online_subspace_descent(
            falling, penalty=0.5, weight_decay=DECAY, **OTHER
        ),
        lambda x: online_subspace_descent(x, 0.5, falling),
        decay=DECAY,
        adam=OTHER,
        rate=falling,
        tree="pair",
    ),
    "ldadam": Case(lambda: lrjax.ldadam(RATE), ldadam, **LDADAM),
    "ldadam(rank)": Case(
        lambda: lrjax.ldadam(RATE, 2, weight_decay=DECAY, **OTHER),
        lambda x: ldadam(x, 2),
        decay=DECAY,
        adam=OTHER,
        tree="pair",
    ),
    "ldadam(no feedback)": Case(
        lambda: lrjax.ldadam(RATE, 2, error_feedback=False),
        lambda x: ldadam(x, 2, feedback=False),
        **LDADAM,
        tree="pair",
    ),
    "fira": Case(lambda: lrjax.fira(RATE), fira, steps=210),
    "fira(period)": Case(
        lambda: lrjax.fira(RATE, **OTHER_PERIOD),
        lambda x: fira(x, 4),
        decay=DECAY,
        adam=OTHER,
        tree="pair",
    ),
    "frugal": Case(lambda: lrjax.frugal(RATE), frugal, steps=210),
    "frugal(period)": Case(
        lambda: lrjax.frugal(RATE, residual=0.3, **OTHER_PERIOD),
        lambda x: frugal(x, 4, residual=0.3),
        decay=DECAY,
        adam=OTHER,
        tree="pair",
    ),
    "subtrack": Case(lambda: lrjax.subtrack(RATE), subtrack, steps=210),
    "subtrack(period)": Case(
        lambda: lrjax.subtrack(RATE, **OTHER_PERIOD),
        lambda x: subtrack(x, 4),
        decay=DECAY,
        adam=OTHER,
        tree="pair",
    ),
    "subspace_adam": Case(lambda: lrjax.subspace_adam(RATE), subspace_adam),
    "subspace_adam(blocks)": Case(
        lambda: lrjax.subspace_adam(RATE, 4, blocks=2, weight_decay=DECAY, **OTHER),
        lambda x: subspace_adam(x, rank=4, blocks=2),
        decay=DECAY,
        adam=OTHER,
        tree="pair",
    ),
    "apollo": Case(lambda: lrjax.apollo(RATE), apollo, steps=210, **SINGLE),
    "apollo(mini)": Case(
        lambda: lrjax.apollo(RATE, 1, over="tensor", scale=128**0.5, **OTHER_PERIOD),
        lambda x: apollo(x, 1, 4, scale=128**0.5, tensor=True),
        decay=DECAY,
        adam=OTHER,
        **SINGLE,
        tree="pair",
    ),
    "sumo": Case(lambda: lrjax.sumo(RATE), sumo, steps=210),
    "sumo(period)": Case(
        lambda: lrjax.sumo(RATE, max_growth=0.9, **PERIOD),
        lambda x: sumo(x, 4, growth=0.9),
        decay=DECAY,
        tree="pair",
    ),
    "flora": Case(lambda: lrjax.flora(RATE), flora, steps=1010, **FLORA),
    "flora(period)": Case(
        lambda: lrjax.flora(RATE, 2, **PERIOD),
        lambda x: flora(x, 2, 4),
        decay=DECAY,
        tree="large",
        **FLORA,
    ),
    "adam_sn": Case(lambda: lrjax.adam_sn(RATE), adam_sn),
    "adam_sn(betas)": Case(
        lambda: lrjax.adam_sn(RATE, weight_decay=DECAY, **OTHER),
        adam_sn,
        tree="pair",
        decay=DECAY,
        adam=OTHER,
    ),
    "snsm": Case(lambda: lrjax.snsm(RATE), snsm, steps=210),
    "snsm(period)": Case(
        lambda: lrjax.snsm(RATE, 2, **OTHER_PERIOD),
        lambda x: snsm(x, 2, 4),
        decay=DECAY,
        adam=OTHER,
        tree="pair",
    ),
    "dion": Case(lambda: lrjax.dion(RATE), lambda x: dion(x, 2), decay=0.01, sided=False),
    "dion(qr)": Case(
        lambda: lrjax.dion(RATE, 3, normalize="qr", weight_decay=DECAY),
        lambda x: dion(x, 3, orthonormal=True),
        decay=DECAY,
        sided=False,
        tree="pair",
    ),
    "dion2": Case(lambda: lrjax.dion2(RATE), dion2, decay=0.01, sided=False, tree="pair"),
    "dion2(fraction)": Case(
        lambda: lrjax.dion2(RATE, 0.5, momentum=0.8, weight_decay=DECAY),
        lambda x: dion2(x, 0.5, decay=0.8),
        decay=DECAY,
        sided=False,
    ),
    "dion3": Case(lambda: lrjax.dion3(RATE), dion3, decay=0.01, sided=False, tree="pair"),
    "dion3(fraction)": Case(
        lambda: lrjax.dion3(RATE, 0.5, b2=0.8, eps=0.1, weight_decay=DECAY),
        lambda x: dion3(x, 0.5, b2=0.8, eps=0.1),
        decay=DECAY,
        sided=False,
    ),
    "normuon": Case(lambda: lrjax.normuon(RATE), normuon, decay=0.01, sided=False),
    "normuon(numbers)": Case(
        lambda: lrjax.normuon(
            RATE, momentum=0.8, b2=0.7, eps=0.1, scale=2.0, weight_decay=DECAY
        ),
        lambda x: normuon(x, decay=0.8, b2=0.7, eps=0.1, rms=2.0),
        decay=DECAY,
        sided=False,
        tree="pair",
    ),
    "power_sgd": Case(lambda: lrjax.power_sgd(RATE), power_sgd, tree="medium", **POWER_SGD),
    "power_sgd(rank)": Case(
        lambda: lrjax.power_sgd(RATE, 1, weight_decay=DECAY),
        lambda x: power_sgd(x, 1),
        decay=DECAY,
        **POWER_SGD,
    ),
    "muon": Case(lambda: lrjax.muon(RATE), muon, sided=False),
    "muon(numbers)": Case(
        lambda: lrjax.muon(RATE, momentum=0.8, nesterov=False, weight_decay=DECAY),
        lambda x: muon(x, decay=0.8, nesterov=False),
        decay=DECAY,
        sided=False,
        tree="pair",
    ),
    "mofasgd": Case(lambda: lrjax.mofasgd(RATE), mofasgd, sided=False),
    "mofasgd(rank)": Case(
        lambda: lrjax.mofasgd(RATE, 2, weight_decay=DECAY),
        lambda x: mofasgd(x, 2),
        decay=DECAY,
        sided=False,
        tree="pair",
    ),
    "kl_shampoo": Case(
        lambda: lrjax.kl_shampoo(RATE),
        kl_shampoo,
        decay=0.01,
        tree="square",
        steps=30,
        sided=False,
    ),
    "kl_shampoo(numbers)": Case(
        lambda: lrjax.kl_shampoo(RATE, eps=0.1, max_side=9, **NUMBERS),
        lambda x: kl_shampoo(x, period=4, eps=0.1, max_side=9),
        decay=DECAY,
        sided=False,
    ),
    "psgd_kron": Case(lambda: lrjax.psgd_kron(RATE), psgd_kron, sided=False),
    "psgd_kron(numbers)": Case(
        lambda: lrjax.psgd_kron(
            RATE, momentum=0.5, rate=0.2, clip_rms=0.6, max_side=9, weight_decay=DECAY
        ),
        lambda x: psgd_kron(x, decay=0.5, rate=0.2, clip=0.6, max_side=9),
        decay=DECAY,
        sided=False,
    ),
    "soap": Case(
        lambda: lrjax.soap(RATE),
        soap,
        soap_rest,
        decay=0.01,
        tree="square",
        steps=30,
        sided=False,
    ),
    "soap(short)": Case(
        lambda: lrjax.soap(RATE, side="short", **PERIOD),
        lambda x: soap(x, 4, right=False),
        soap_rest,
        decay=DECAY,
        tree="pair",
    ),
}


@functools.partial(jax.jit, static_argnums=0)
def trajectory(tx, params, grads):
    """The updates of all steps, at fixed parameters."""
    step = lambda state, g: tx.update(g, state, params)[::-1]
    return jax.lax.scan(step, tx.init(params), grads)[1]


def expected(case, name, place, places, grads):
    """What the reference says of one leaf."""
    grads = case.scaled(grads)
    if name not in case.chosen:
        return (case.rest or functools.partial(dense.adam, **case.adam))(grads)
    stacked = grads if grads.ndim == 4 else grads[:, None]
    tall = case.sided and grads.shape[-2] > grads.shape[-1]
    view = lambda x: np.swapaxes(x, -2, -1) if tall else x
    members = [view(stacked[:, i]) for i in range(stacked.shape[1])]
    make = lambda i: Matrix(members[i], members, i, place, places, tall, case.adam)
    out = [view(case.matrix(make(i))) for i in range(len(members))]
    return np.stack(out, axis=1).reshape(grads.shape)


@pytest.mark.slow_but(*(name for name in CASES if "(" not in name))
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, x64):
    case = CASES[name]
    grads = gradients(case.tree, case.steps)
    rng = np.random.default_rng(1)
    params = {k: rng.normal(size=shape) for k, shape in TREES[case.tree].items()}
    got = trajectory(case.make(), params, grads)
    rates = case.rate(np.arange(case.steps))
    chosen = [leaf for leaf in grads if leaf in case.chosen]
    for leaf, g in grads.items():
        place = chosen.index(leaf) if leaf in chosen else -1
        direction = expected(case, leaf, place, len(chosen), g)
        decayed = case.decay * params[leaf] if leaf in DECAYED else 0.0
        rate = rates.reshape(-1, *(1 for _ in g.shape[1:]))
        want = -rate * (direction + decayed)
        errors = [relative_error(*x) for x in zip(got[leaf], want, strict=True)]
        worst = int(np.argmax(errors))
        assert errors[worst] < case.tolerance, f"{leaf}, step {worst}: {errors[worst]:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "rank", "clip", "decay"),
    [
        (lambda: lrjax.psgd(RATE), 10, 2.0, 0.0),
        (lambda: lrjax.psgd(RATE, 2, clip_rms=0.5, weight_decay=DECAY), 2, 0.5, DECAY),
        (lambda: lrjax.psgd(RATE, 2, clip_rms=None), 2, np.inf, 0.0),
    ],
    ids=["psgd", "clipped", "free"],
)
def test_psgd_equals_the_reference(make, rank, clip, decay, x64):
    """Of all parameters together, as one vector; the RMS of the clip is in float32."""
    tree, steps = TREES["tiny"], 20
    grads = gradients("tiny", steps)
    for g in grads.values():
        g[9] *= 30  # the limit of the RMS is at work,
    grads["wide"][14, 2, 3] *= 300  # and that of single entries
    rng = np.random.default_rng(1)
    params = {name: rng.normal(size=shape) for name, shape in tree.items()}
    flat = lambda x: np.concatenate([np.asarray(y).reshape(-1) for y in x.values()])
    first, noise = (jr.fold_in(jr.key(0), i) for i in (0, 1))
    start = [normal_like(k, tree, rank) for k in jr.split(first)]
    u, v = (np.sqrt(0.1) * x / np.linalg.norm(x) for x in start)
    gs = [flat({name: g[t] for name, g in grads.items()}) for t in range(steps)]
    draws = [normal_like(jr.fold_in(noise, t), tree) for t in range(steps)]
    directions = curvature.whitened(u, v, gs, draws, rate=0.1, damping=1e-9, clip=clip)
    got = trajectory(make(), params, grads)
    for t, direction in enumerate(directions):
        decayed = {k: decay * x * (k in DECAYED) for k, x in params.items()}
        want = -RATE * (direction + flat(decayed))
        error = relative_error(flat({name: x[t] for name, x in got.items()}), want)
        assert error < 1e-6, f"step {t}: {error:.1e}"


# Recipes for weights whose rank moves, and those of all parameters together, are tested
# beside their transforms.
ELSEWHERE = {
    "nn/test_grassmann_head.py": ("grassmann_sgd",),
    "adapters/test_robust.py": ("autolora",),
    "recipes/test_lora_mgpo.py": ("lora_mgpo",),
    "transforms/test_scale_by_gradient_window.py": ("mfac",),
    "transforms/test_ordered_columns.py": ("maestro",),
    "transforms/test_riemannian.py": ("cond_lr", "dlrt", "riemannian_sgd", "robust_dlrt"),
    "transforms/test_sample_directions.py": ("sst",),
    "transforms/test_spectra.py": ("proximal_gradient", "trp"),
}


def test_every_recipe_has_a_reference():
    exported = {
        name for name, value in vars(lrjax.recipes).items() if inspect.isfunction(value)
    }
    tests = Path(__file__).parent.parent
    for file, names in ELSEWHERE.items():
        assert all(f"lrjax.{name}(" in (tests / file).read_text() for name in names), file
    elsewhere = {name for names in ELSEWHERE.values() for name in names}
    assert {*CASES, *PAIR_CASES, "psgd", *elsewhere} >= exported
