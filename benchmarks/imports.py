"""What `import lightning_mi` costs beside `import torch`, which it needs; the promise is 1.10 x.

Fresh processes, the two imports taking turns, so that a busy machine slows both; the ratio of
each pair is taken, then the median of the ratios.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMISE = 1.10


def cpu_seconds(code: str) -> float:
    """Return the CPU time of a fresh process that runs the code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print the median ratio with the range of its middle half."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=11, help="pairs of processes (default: 11)")
    pairs = parser.parse_args().pairs
    for code in ("import torch", "import lightning_mi"):
        cpu_seconds(code)  # Fills the disk's cache.
    torch, ratios = [], []
    for _ in range(pairs):
        torch.append(cpu_seconds("import torch"))
        ratios.append(cpu_seconds("import lightning_mi") / torch[-1])
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"import torch         {statistics.median(torch):.2f} CPU s (median of {pairs})")
    print(f"import lightning_mi  {middle:.3f} x that (middle half {low:.3f} to {high:.3f})")
    print(f"promised: at most {PROMISE:.2f} x: {'kept' if middle <= PROMISE else 'NOT kept'}")


if __name__ == "__main__":
    main()
