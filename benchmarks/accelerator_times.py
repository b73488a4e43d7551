"""How long do the programs of `accelerators` take on the accelerator of this machine?

Each in turn with the train step of Adam on the same layer, warm, median of 20. On a machine
without a GPU nothing is measured; ``accelerator_times.py tpu`` takes a TPU.
"""

import sys

import _programs
import jax
import jax.random as jr
from _harness import bound, interleaved, median_ratio, medians, write_results


def measure(device: jax.Device, names: list[str], repeats: int = 20) -> list[dict]:
    """Milliseconds of each program on one device, and how many steps of Adam that is."""
    programs = _programs.programs()
    adam = _ready(programs["adam"], device)
    rows = []
    for name in names:
        try:
            functions = {"adam": adam, "this": _ready(programs[name], device)}
            seconds = interleaved(functions, repeats)
        except Exception as error:
            rows.append(
                {"program": name, "failed": f"{type(error).__name__}: {error}"[:300]}
            )
            continue
        ratio = median_ratio(seconds, "this", "adam")
        milliseconds = 1e3 * medians(seconds)["this"]
        rows.append({"program": name, "milliseconds": milliseconds, "over adam": ratio})
    return rows


def _ready(program: _programs.Program, device: jax.Device):
    """The program with its arguments on a device, which are kept: nothing is donated."""
    with jax.default_device(device):
        arguments = jax.device_put(program.arguments(jr.key(0)), device)
    function = jax.jit(program.function)
    return lambda: function(*arguments)


def main() -> None:
    (platform,) = sys.argv[1:] or ["gpu"]
    try:
        device = jax.devices(platform)[0]
    except RuntimeError as error:
        print(f"nothing is measured: {error}")
        return
    names = [name for name, p in _programs.programs().items() if p.specs is None]
    rows = measure(device, names)
    failed = sum("failed" in row for row in rows)
    bounds = [bound("programs that do not run", failed, at_most=0)]
    write_results("accelerator_times", rows, bounds)


if __name__ == "__main__":
    main()
