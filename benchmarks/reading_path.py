"""How much code a reader meets who follows one init and update of an optimizer.

Counted with ``sys.setprofile`` on one 16 × 32 matrix: the files of this package whose
functions run, the functions, the lines of these files, and the hops, that is how often the
next function to be entered lies in another file than the one before.
"""

import itertools
import sys
from pathlib import Path

import jax.numpy as jnp
import optax
from _harness import bound, write_results

import lrjax


ROOT = str(Path(lrjax.__file__).parent)
OPTAX = str(Path(optax.__file__).parent)


def follow(make, package: str) -> dict[str, int]:
    """What runs of a package while an optimizer is made, started and used once."""
    entered: list[tuple[str, str]] = []

    def note(frame, event, argument):
        del argument
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package):
            entered.append((code.co_filename, code.co_qualname))

    params = {"w": jnp.ones((16, 32))}
    sys.setprofile(note)
    tx = make()
    tx.update(params, tx.init(params), params)
    sys.setprofile(None)
    files = {file for file, _ in entered}
    folders = {Path(file).relative_to(package).parts for file in files}
    steps = itertools.pairwise(entered)
    return {
        "files": len(files),
        "rooms": len({parts[0] for parts in folders if len(parts) > 1}),
        "functions": len(set(entered)),
        "lines": sum(len(Path(file).read_text().splitlines()) for file in files),
        "hops": sum(a[0] != b[0] for a, b in steps),
    }


def main():
    rows = [
        {"optimizer": name, **follow(lambda name=name: getattr(lrjax, name)(1e-3), ROOT)}
        for name in ("fira", "galore", "subspace_adam", "dion")
    ]
    galore = lambda: optax.contrib.galore(1e-3, rank=4)
    rows.append({"optimizer": "optax.contrib.galore", **follow(galore, OPTAX)})
    fira = rows[0]
    bounds = [
        bound("fira: files", fira["files"], at_most=8),
        bound("fira: hops between files", fira["hops"], at_most=45),
        bound("fira: rooms", fira["rooms"], at_most=3),
    ]
    write_results("reading_path", rows, bounds)


if __name__ == "__main__":
    main()
