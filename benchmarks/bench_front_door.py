"""How long the front door takes to open: ``import elbozoo`` and ``elbozoo --help``, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time

from harness import Agreement, Contest, Job, Outcome, Side, main

LIMIT = 0.3  # seconds
COMMANDS = {
    "import": "import elbozoo",
    "help": "import sys; sys.argv = ['elbozoo', '--help']; from elbozoo.cli import main; main()",
}
AGREEMENT = Agreement("both end with status 0", absolute=0.0)


def contests(size: str, device: str) -> list[Contest]:
    """Return the import and the command, each against the limit."""
    return [
        Contest(
            name=name,
            peer=f"limit of {LIMIT} s",
            packages=("elbozoo",),
            sizes={},
            target=1.0,
            sides=lambda code=code: (_opens(code), lambda: Outcome(LIMIT, 0.0)),  # type: ignore[misc]
            agreement=AGREEMENT,
        )
        for name, code in COMMANDS.items()
    ]


def _opens(code: str) -> Side:
    def side() -> Outcome:
        before = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False)
        return Outcome(time.perf_counter() - before, float(done.returncode))

    return side


JOB = Job("front-door", "Opening of the front door", contests)

if __name__ == "__main__":
    sys.exit(main(JOB))
