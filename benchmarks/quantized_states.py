"""What do eight and four bits a moment cost in training, and what do they save?

Adam and ``subspace_adam`` with their moments in float32, at eight and at four bits between
the steps, at the best of three rates each: a multilayer perceptron on digits with fresh
noise and one on the characters of Python's manual, three seeds. Bytes are those of the
codes and their scales over the number of moments; the formula is that of `quantize_state`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _harness import bound, write_results
from subspace_moment_transport import RANK, characters, digits, train

import lrjax


BITS = (32, 8, 4)
BLOCK = 256
RATES = 2e-3 * 2.0 ** np.arange(3)
SETTING = {"rates": RATES, "seeds": 3, "steps": 500}
OPTIMIZERS = {
    "adam": optax.scale_by_adam(),
    "subspace_adam": lrjax.subspace_adam(-1.0, RANK, weight_decay=0.0),
}


def stored(tx, bits):
    """The optimizer with its moments at so many bits."""
    if bits == 32:
        return tx
    return lrjax.quantize_state(tx, block=BLOCK, min_size=1024, bits=bits)


def moment_bytes(tx, task):
    """Bytes of the moments that are stored as codes, their number, and the formula's."""
    params = jax.eval_shape(task()[0], jax.random.key(0))
    state = jax.eval_shape(tx.init, params)
    kinds = (lrjax.subspaces.BlockQuantized, lrjax.subspaces.PackedQuantized)
    is_code = lambda x: isinstance(x, kinds)
    found, numbers, formula = 0, 0, 0.0
    for field in filter(is_code, jax.tree.leaves(state, is_leaf=is_code)):
        half = isinstance(field, kinds[1])
        codes, treedef = jax.tree.flatten(field.codes)
        for code, scale in zip(codes, treedef.flatten_up_to(field.scale), strict=True):
            if isinstance(scale, optax.MaskedNode):
                continue
            *batch, rows, columns = code.shape
            columns = columns * (2 if half else 1)
            long, short = max(rows, columns), min(rows, columns)
            number = math.prod(batch) * rows * columns
            numbers += number
            found += code.size * code.dtype.itemsize + scale.size * scale.dtype.itemsize
            formula += number / (2 if half else 1)
            formula += 4 * math.prod(batch) * short * -(-long // BLOCK)
    return found, numbers, formula


def compare(task, name):
    """One row for each number of bits, and the losses of the seeds at its best rate."""
    rows, best = [], {}
    for bits in BITS:
        tx = stored(OPTIMIZERS[name], bits)
        losses = np.nan_to_num(train(task, tx, **SETTING), nan=np.inf)
        at = int(losses.mean(axis=1).argmin())
        best[bits] = losses[at]
        found, numbers, formula = moment_bytes(tx, task) if bits < 32 else (4, 1, 4)
        rows.append(
            {
                "task": task.__name__,
                "optimizer": name,
                "bits": bits,
                "bytes a number": found / numbers,
                "the formula's": formula / numbers,
                "best rate": float(RATES[at]),
                "loss": float(losses[at].mean()),
                "standard error": float(losses[at].std(ddof=1) / len(losses[at]) ** 0.5),
                "by rate": "  ".join(f"{loss:.3f}" for loss in losses.mean(axis=1)),
            }
        )
    return rows, best


def main():
    rows, bounds = [], []
    for task in (digits, characters):
        for name in OPTIMIZERS:
            new, best = compare(task, name)
            rows += new
            for bits, limit in ((8, 0.02), (4, 0.05)):
                excess = float(jnp.mean(best[bits] - best[32]))
                claim = f"{task.__name__}, {name}: loss at {bits} bits above float32's"
                bounds.append(bound(claim, excess, at_most=limit))
    coded = [row for row in rows if row["bits"] < 32]
    off = max(abs(row["bytes a number"] / row["the formula's"] - 1) for row in coded)
    bounds.append(bound("bytes over the formula's, less one", off, at_most=0.0))
    four = max(row["bytes a number"] for row in coded if row["bits"] == 4)
    bounds.append(bound("bytes a number at four bits, blocks of 128", four, at_most=0.55))
    write_results("quantized_states", rows, bounds, "scikit-learn")


if __name__ == "__main__":
    main()
