"""The names by which papers are known, for ``LoRA(init=…)``."""

from .from_data import GradientStart, SpectralStart, StepStart, VarianceStart, WeightedStart
from .start import OrthogonalStart, QRStart, SingularStart, SmallStart, Start, ZeroStart


STARTS: dict[str, Start] = {
    "default": ZeroStart(),
    "gaussian": ZeroStart(normal=True),
    "orthogonal": OrthogonalStart(),
    "small": SmallStart(),
    "pissa": SingularStart("largest"),
    "milora": SingularStart("smallest"),
    "olora": QRStart(),
    "lora_ga": GradientStart(),
    "lora_one": StepStart(),
    "spectral": SpectralStart(),
    "eva": VarianceStart(),
    "corda": WeightedStart("largest"),
    "corda_kpm": WeightedStart("smallest"),
}


def checked_start(init: str | Start) -> Start:
    """A start, from its name perhaps."""
    if isinstance(init, Start):
        return init
    if init not in STARTS:
        raise ValueError(
            f"LoRA's init must be one of {sorted(STARTS)} or an instance of "
            f"lrjax.adapters.Start, got {init!r}."
        )
    return STARTS[init]
