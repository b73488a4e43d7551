"""``python -m lrjax``: the tour, five jobs on real data that check themselves."""

import argparse
import importlib
import importlib.util
import json
import platform
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path

from ._tour.report import Report


PARTS = {
    "recover": "a hyperspectral scene under gross noise and missing entries, rank unknown",
    "finetune": "a digit classifier adapted to new digits by LoRA",
    "sweep": "32 hyper-parameters in one compiled program",
    "flow": "the gradient flow of LoRA against its closed form",
    "text": "a pretrained sentence encoder adapted by LoRA",
}
EXTRAS = ("matplotlib", "mlxtend", "rich", "skimage", "tensorly", "tqdm", "xarray")


def main(arguments: list[str] | None = None) -> int:
    """Run the tour; the exit status is 1 if a part misses a bound or breaks."""
    options = _parse(arguments)
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"the tour needs {', '.join(missing)}: python -m pip install 'lrjax[tour]'",
            file=sys.stderr,
        )
        return 1
    from ._tour.show import print_environment, print_report

    options.out.mkdir(parents=True, exist_ok=True)
    environment = _environment()
    print_environment(environment)
    results = {"environment": environment, "quick": options.quick, "parts": {}}
    passed = True
    for name in options.only or PARTS:
        start = time.perf_counter()
        report = _run(name, options)
        seconds = time.perf_counter() - start
        print_report(report, seconds, options.out)
        passed &= all(check.ok for check in report.checks)
        results["parts"][name] = _as_json(report, seconds)
    path = options.out / "tour.json"
    path.write_text(json.dumps(results, indent=2, default=float) + "\n")
    print(f"\nall numbers: {path}")
    return 0 if passed else 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    listing = "\n".join(f"  {name:9} {what}" for name, what in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m lrjax",
        description="A tour of lrjax on real data. The parts:\n" + listing,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", action="append", choices=PARTS, help="run this part; may be repeated"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("lrjax-tour"),
        metavar="DIR",
        help="where pictures and numbers go (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="smaller runs of each part")
    return parser.parse_args(arguments)


def _run(name: str, options: argparse.Namespace) -> Report:
    part = importlib.import_module(f"._tour.{name}", __package__)
    try:
        return part.run(options.out, options.quick)
    except Exception:
        from ._tour.report import Check

        traceback.print_exc()
        return Report(title=PARTS[name], checks=(Check("parts that failed", 1, 0),))


def _as_json(report: Report, seconds: float) -> dict:
    checks = [{**check._asdict(), "ok": check.ok} for check in report.checks]
    return {**report._asdict(), "checks": checks, "seconds": seconds}


def _environment() -> dict[str, str]:
    import jax

    device = jax.devices()[0]
    packages = ("lrjax", "jax", "optax", "equinox", "diffrax")
    return {
        "device": f"{device.platform} ({device.device_kind}) x {jax.device_count()}",
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "precision": str(jax.numpy.result_type(float)),
    }


if __name__ == "__main__":
    sys.exit(main())
