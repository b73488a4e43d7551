"""LoRA as PEFT keeps it: rsLoRA, DoRA, the inits that take from the base, experts."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ....linalg import cross, orthonormalize, truncated_svd
from ....lowrank import LowRank
from ...kinds.around import Magnitude
from ...kinds.factors import Factors
from ...ranks.masks import without_masked
from .._config import alpha_of, by_pattern, number, one_value, patterns_of
from .._names import Module
from ._format import Format, Part, misfit
from ._layout import Names, check_convolution, pair_as_stored, read_pair


NAMES = Names(("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
MAGNITUDE = "lora_magnitude_vector"

_NEED_DATA = {
    "corda": "the covariance of activations",
    "lora_ga": "a gradient",
    "loftq": "the quantized base",
    "pissa_niter": "the random numbers of its decomposition",
}


class _Facts(NamedTuple):
    rank: int
    scale: float
    power: float  # of the rank in the denominator of the scale
    has_magnitude: bool


class Lora(Format):
    """Factors, also those that another adapter comes down to; with lengths of rows DoRA."""

    name = "LORA"
    suffixes = (
        *NAMES.linear,
        *NAMES.embedding,
        MAGNITUDE,
        f"{MAGNITUDE}.weight",
        "lora_B.bias",
    )
    dropout = "lora_dropout"
    kinds = ()

    def accepts(self, part):
        """Whether it is a product of factors, perhaps with lengths of rows."""
        return jax.eval_shape(factors_of(part), part.adapter) is not None

    def write(self, part):
        """Residual adapters in the form that needs no new base."""
        module, adapter = part.module, without_masked(part.adapter)
        pair, scales = factors_of(part)(adapter)
        left, scale = _of_one_scale(np.asarray(pair.left), np.asarray(scales))
        tensors = pair_as_stored(module, left, np.asarray(pair.right), NAMES)
        if has_magnitude := isinstance(adapter, Magnitude):
            tensors[MAGNITUDE] = _as_magnitude(module, np.asarray(adapter.magnitude))
        return tensors, _Facts(pair.rank, scale, _power_of(adapter), has_magnitude)

    def config(self, facts):
        """Rank and alpha of most modules, and patterns for the others."""
        rank, ranks = patterns_of({name: fact.rank for name, fact in facts.items()})
        stabilized = all(fact.power == 0.5 for fact in facts.values())
        power = 0.5 if stabilized else 1
        alpha, alphas = patterns_of(
            {name: alpha_of(fact.scale, fact.rank**power) for name, fact in facts.items()}
        )
        has = (fact.has_magnitude for fact in facts.values())
        fix = "save DoRA and LoRA adapters in directories of their own."
        return {
            "r": rank,
            "rank_pattern": ranks,
            "lora_alpha": alpha,
            "alpha_pattern": alphas,
            "use_dora": one_value("use_dora", has, fix),
            "use_rslora": stabilized,
            "lora_bias": False,
            "init_lora_weights": True,
        }

    def read(self, module, tensors, config):
        """The scale from alpha and the rank of the tensors."""
        pair = read_pair(module, tensors, NAMES)
        rank = pair.rank
        usual = number(config, "lora_alpha", 8)
        alpha = by_pattern(config, "alpha_pattern", module.name, usual)
        stabilized = bool(config.get("use_rslora"))
        scale = alpha / (math.sqrt(rank) if stabilized else rank)
        start = _start(module, rank, scale, config)
        adapter = as_factors(pair, scale, self.rate(config), start, module)
        if stabilized:
            adapter = dataclasses.replace(adapter, power=0.5)
        magnitude = tensors.get(MAGNITUDE, tensors.get(f"{MAGNITUDE}.weight"))
        if bool(config.get("use_dora")) != (magnitude is not None):
            raise ValueError(
                f"use_dora is {config.get('use_dora')!r} in the config, and the file has "
                f"{'no' if magnitude is None else 'a'} {MAGNITUDE} for {module.name!r}."
            )
        if magnitude is None:
            return adapter
        if magnitude.size != module.site.shape[0]:
            raise misfit(module, {MAGNITUDE: magnitude})
        return Magnitude(magnitude=jnp.asarray(magnitude.reshape(-1)), inner=adapter)

    def check(self, module):
        """Refuse convolutions that PEFT adapts otherwise, or not at all."""
        super().check(module)
        check_convolution(module)


def factors_of(part: Part) -> Callable[[Any], Any]:
    """The factors of an adapter like that of a part, or of the one in a Magnitude."""

    def factors(adapter: Any) -> Any:
        inner = adapter.inner if isinstance(adapter, Magnitude) else adapter
        return inner.factors(part.pool)

    return jax.vmap(factors) if part.module.experts else factors


def _of_one_scale(left: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, float]:
    """The left factors of experts, with what their scales differ in: PEFT has one."""
    largest = float(scales.flat[np.argmax(np.abs(scales))])
    if np.all(scales == largest):
        return left, largest
    return left * (scales / largest)[..., None, None].astype(left.dtype), largest


def _power_of(adapter: Any) -> float:
    """That of the rank in the scale, where the rank of the file is that of the factors."""
    inner = adapter.inner if isinstance(adapter, Magnitude) else adapter
    if isinstance(inner, Factors) and inner.start is None:
        return inner.power
    return 1.0


def _as_magnitude(module: Module, magnitude: np.ndarray) -> np.ndarray:
    if module.experts or (module.is_embedding and module.is_transposed):
        raise ValueError(f"PEFT has no DoRA for a weight like that of {module.name!r}.")
    if module.kernel:
        return magnitude.reshape(1, -1, *(1,) * (len(module.kernel) - 1))
    return magnitude


def as_factors(
    pair: LowRank,
    scale: int | float,
    rate: Array | None = None,
    start: LowRank | None = None,
    module: Module | None = None,
) -> Factors:
    """Two factors as an adapter of one matrix, or of all experts of a parameter."""
    lead = () if module is None or not module.experts else (module.experts,)
    return Factors(pair, start, jnp.full(lead, scale, jnp.float32), rate, "both")


def expert_shapes_fit(module: Module, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether tensors of these shapes can be those of the experts."""
    if any(name not in shapes for name in NAMES.linear):
        return False
    (_, n), (m, _) = (shapes[name][-2:] for name in NAMES.linear)
    return module.site.shape in ((m, n), (n, m))


def _start(
    module: Module, rank: int, scale: int | float, config: Mapping
) -> LowRank | None:
    """What the init took off the base, which PEFT takes off again when it loads."""
    init = str(config.get("init_lora_weights", True)).lower()
    for name, needs in _NEED_DATA.items():
        if init.startswith(name):
            raise ValueError(
                f"init_lora_weights={init!r} took a part off the base weights that is not "
                f"in the file, and finding it again needs {needs}. Save it in PEFT with "
                "save_pretrained(…, path_initial_model_for_weight_conversion=…), which "
                "writes it as plain LoRA."
            )
    if init == "pissa":
        u, values, v = truncated_svd(module.read(), rank)
        return LowRank(u * (values / scale)[None, :], v)
    if init == "olora":
        if config.get("fan_in_fan_out"):
            raise ValueError(
                "init_lora_weights='olora' with fan_in_fan_out decomposed the transposed "
                "weights in PEFT, which has no counterpart: save it there as plain LoRA."
            )
        weight = module.read()
        q = orthonormalize(weight[:, :rank])  # of W = Q R: Q's first columns, R's rows
        return LowRank(q, cross(weight, q))
    return None
