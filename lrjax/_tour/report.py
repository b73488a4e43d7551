from typing import NamedTuple


class Check(NamedTuple):
    """One bound that a part of the tour states and measures."""

    claim: str
    value: float
    bound: float
    at_most: bool = True

    @property
    def ok(self) -> bool:
        """Whether the measured value keeps the bound (a NaN does not)."""
        return self.value <= self.bound if self.at_most else self.value >= self.bound


class Report(NamedTuple):
    """What a part of the tour hands back: a table, its checks and its pictures.

    ``rows`` are dicts with the same keys, printed as one table and stored as JSON.
    ``skipped`` holds the sentence that says what is missing when the part could not run.
    """

    title: str
    rows: tuple[dict[str, object], ...] = ()
    checks: tuple[Check, ...] = ()
    figures: tuple[str, ...] = ()
    skipped: str = ""
