"""What `import lightning_mi` costs beside `import torch`, which it needs; the promise is 1.10 x.

Fresh processes, the two imports taking turns; their whole CPU time counts.
"""

from __future__ import annotations

import argparse
import statistics

from harness import compared, fresh, in_turns, verdict

OURS, TORCH = "import lightning_mi", "import torch"
PROMISE = 1.10


def main() -> None:
    """Print the median ratio with its interval."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11, help="pairs of processes")
    rounds = parser.parse_args().rounds
    for code in (TORCH, OURS):
        fresh(["-c", code])  # Fills the disk's cache.
    found = in_turns([TORCH, OURS], rounds, lambda code: {"seconds": fresh(["-c", code])[0]})
    seconds = statistics.median(r[TORCH]["seconds"] for r in found)
    ratio = compared(found, OURS, TORCH)
    print(f"{TORCH:20} {seconds:.2f} CPU s")
    print(f"{OURS:20} {ratio} x that, {verdict(ratio.median, PROMISE)}")


if __name__ == "__main__":
    main()
