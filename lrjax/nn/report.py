from typing import NamedTuple


class LayerFactors(NamedTuple):
    """What became of the weight of one layer.

    Attributes:
        path: where the layer is.
        shape: of its matrix, ``(*stack, m, n)``.
        rank: of its factors; ``None`` if it stayed dense.
        before: how many numbers the weight had.
        after: how many it has.
        error: ``‖W − W'‖ / ‖W‖``, over a stack as a whole.
        kept_dense: why it stayed dense, or ``None``.
        output_error: the same of what the layer gives, over the inputs that were seen, or
            ``None`` where there were none.
    """

    path: str
    shape: tuple[int, ...]
    rank: int | None
    before: int
    after: int
    error: float
    kept_dense: str | None
    output_error: float | None = None


class FactorReport(NamedTuple):
    """What became of a model, layer by layer; prints as a table.

    Attributes:
        layers: one row for each layer that was chosen.
        before: how many numbers the whole model had.
        after: how many it has.
    """

    layers: tuple[LayerFactors, ...]
    before: int
    after: int

    @property
    def ratio(self) -> float:
        """The size of the model over what it was."""
        return self.after / self.before

    def __str__(self) -> str:
        width = max([5, *(len(row.path) for row in self.layers)])
        of_outputs = any(row.output_error is not None for row in self.layers)
        head = f"{'layer':<{width}}  {'shape':>18}  {'rank':>5}  {'before':>12}"
        last = f"  {'of outputs':>10}" if of_outputs else ""
        lines = [f"{head}  {'after':>12}  {'error':>8}{last}"]
        for row in self.layers:
            line = f"{row.path:<{width}}  {row.shape!s:>18}  {row.rank or 'dense':>5}  "
            line += f"{row.before:>12,}  {row.after:>12,}  {row.error:>8.2e}"
            if of_outputs:
                error = "" if row.output_error is None else f"{row.output_error:.2e}"
                line += f"  {error:>10}"
            lines.append(line if row.kept_dense is None else f"{line}  {row.kept_dense}")
        total = f"{'model':<{width}}  {'':>18}  {'':>5}  {self.before:>12,}"
        lines.append(f"{total}  {self.after:>12,}  ({self.ratio:.3f} of its numbers)")
        return "\n".join(lines)
