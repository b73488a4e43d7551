"""Run all benchmarks, or those with a word in the name: ``python benchmarks/run.py gram``.

Each script answers one question, writes ``results/<name>.json`` and exits with status 1
if a bound that it declares is broken. ``python benchmarks/run.py --table`` runs nothing: it
writes docs/benchmarks.md from what is stored.
"""

import subprocess
import sys
from pathlib import Path

import _tables


def main() -> int:
    if sys.argv[1:] == ["--table"]:
        _tables.write()
        return 0
    here = Path(__file__).parent
    words = sys.argv[1:] or [""]
    scripts = sorted(
        path
        for path in here.glob("*.py")
        if path.name != "run.py"
        and not path.name.startswith("_")
        and any(word in path.stem for word in words)
    )
    broken = []
    for script in scripts:
        print(f"\n== {script.stem}", flush=True)
        if subprocess.run([sys.executable, script], check=False).returncode:
            broken.append(script.stem)
    print("\nall bounds kept" if not broken else f"\nbounds missed in: {', '.join(broken)}")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
