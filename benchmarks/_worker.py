"""Compile programs one after the other, in a process of its own for each kind of device.

A compiler may crash, hang or fill the memory; the process that asks survives it and says
so. ``python benchmarks/_worker.py v5e`` reads names of programs, a line each, and answers
with a line of JSON each.
"""

import hashlib
import json
import os
import selectors
import subprocess
import sys
from pathlib import Path


HERE = Path(__file__).parent
# What was measured, by a digest of the program as written, the versions and the reader: an
# interrupted run goes on, and a program that did not change is not compiled again.
MEASURED = HERE / ".measured"


class Worker:
    """A process that compiles for one kind of device; started when it is first asked."""

    def __init__(self, target: str, limit: float = 1200.0):
        """Keep what is needed to start it.

        Args:
            target: the kind of device.
            limit: seconds after which a compilation counts as hanging.
        """
        self.limit = limit
        self.command = [sys.executable, __file__, target]
        self.process, self.log = None, MEASURED / f"{target}-{os.getpid()}.log"

    def measure(self, name: str, *, anew: bool = False) -> dict:
        """What :func:`_hlo.measure` finds of a program, or ``{"failed": reason}``.

        Args:
            name: the name of the program.
            anew: whether to compile it even if that was done before.
        """
        if self.process is None:
            self.process = self._start()
        self.process.stdin.write(f"{json.dumps([name, anew])}\n".encode())
        self.process.stdin.flush()
        with selectors.DefaultSelector() as ready:
            ready.register(self.process.stdout, selectors.EVENT_READ)
            answer = self.process.stdout.readline() if ready.select(self.limit) else None
        if answer:
            return json.loads(answer)
        end = f"no end after {self.limit:g} s" if answer is None else self._last_words()
        self.close()
        return {"failed": end}

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None
            self.log.unlink()

    def _start(self) -> subprocess.Popen:
        path = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
        environment.pop("XLA_FLAGS", None)  # those of this machine's processor
        MEASURED.mkdir(exist_ok=True)
        with self.log.open("wb") as log:  # compilers are talkative
            return subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
            )

    def _last_words(self) -> str:
        code = self.process.wait()
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"the compiler ended with status {code}: {' '.join(lines[-3:])}"


def answer(name: str, anew: bool, devices: list, versions: dict[str, str]) -> dict:
    """Measure one program, or find what was measured before."""
    import _hlo
    import _programs

    readers = (path.read_text() for path in sorted(HERE.glob("_hlo*.py")))
    try:
        lowered = _programs.programs()[name].lower(devices)
        text = "".join([json.dumps(versions), lowered.as_text(), *readers])
        digest = hashlib.sha256(text.encode()).hexdigest()[:24]
        known = MEASURED / f"{digest}.json"
        if known.exists() and not anew:
            return json.loads(known.read_text())
        found = _hlo.measure(lowered)
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        return {"failed": f"{type(error).__name__}: {reason[0][:300]}"}
    known.write_text(json.dumps(found))
    return found


def main() -> None:
    import _targets
    import jax

    (target,) = sys.argv[1:]
    jax.config.update("jax_enable_compilation_cache", False)
    devices, versions = _targets.devices(target), _targets.versions(target)
    for line in sys.stdin:
        name, anew = json.loads(line)
        print(json.dumps(answer(name, anew, devices, versions)), flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main()
