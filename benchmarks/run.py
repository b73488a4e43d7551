"""Run all benchmarks, or those with a word in the name: ``python benchmarks/run.py gram``.

Each script answers one question, writes ``results/<name>.json`` and exits with status 1
if a bound that it declares is broken.
"""

import subprocess
import sys
from pathlib import Path


def main() -> int:
    here = Path(__file__).parent
    words = sys.argv[1:] or [""]
    scripts = sorted(
        path
        for path in here.glob("*.py")
        if path.name not in ("run.py", "_harness.py")
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
