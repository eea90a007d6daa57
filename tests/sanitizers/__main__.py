"""`make sanitize`: kernels and ops under sanitizers, part after part.

    python -m tests.sanitizers --python "env -C build/asan LD_PRELOAD=... python" --cases 5000 --seed 1

A report ends the process that it is about, so a part without one has passed all of its tests.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from tools.reliability import record

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "build" / "sanitize.xml"
#: Left out of tests/ops: accuracy over many draws and fakes, of the same kernels.
OPS = [
    f"tests/ops/test_{name}.py"
    for name in ("conv3x3", "conv_wgrad", "edge_operands", "inference", "into", "residual_block")
]
#: {what is tried: (with csrc under AddressSanitizer and UBSan, arguments of pytest)}
PARTS: dict[str, tuple[bool, list[str]]] = {
    "kernels without Python, under AddressSanitizer, UBSan, LeakSanitizer, ThreadSanitizer and valgrind": (
        False,
        [f"tests/sanitizers/{name}.py" for name in ("test_sanitizers", "races", "uninitialized")],
    ),
    # Where memory is missing, AddressSanitizer's operator new ends the process instead of raising an exception.
    "ops, under AddressSanitizer and UBSan": (
        True,
        [*OPS, "-k", "not failed_allocations_say_so and not scratch_memory_that_is_missing"],
    ),
    "properties, under AddressSanitizer and UBSan": (True, ["tests/properties"]),
    # It reserves more memory than one test allows, and GCC 12's has no support for a fork beside threads that allocate.
    "large buffers, under AddressSanitizer and UBSan": (
        True,
        ["tests/test_buffers.py", "-k", "not memory_runs_out and not forked_child"],
    ),
    "training steps, under AddressSanitizer and UBSan": (True, ["tests/sanitizers/training_steps.py"]),
}
#: Of a test, by what pytest's results have in it.
ENDS = {"failure": "failed", "error": "failed", "skipped": "skipped"}
ILL_FITTING = "ill-fitting operands, under AddressSanitizer and UBSan"


def outcomes_of(results: Path) -> Counter[str]:
    """How many cases of pytest's --junitxml ended how; a test says how many it had, or is one."""
    outcomes = Counter[str]()
    for test in ElementTree.parse(results).iter("testcase"):
        cases = [int(x.get("value", "")) for x in test.iter("property") if x.get("name") == "cases"]
        ends = [end for tag, end in ENDS.items() if test.find(tag) is not None]
        outcomes[ends[0] if ends else "passed"] += sum(cases) or 1
    return outcomes


def run_pytest(python: Sequence[str], arguments: Sequence[str]) -> Counter[str]:
    """Runs tests in one process; where it dies of a report, what ran counts as one failure."""
    RESULTS.unlink(missing_ok=True)
    command = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={RESULTS}", *arguments]
    status = subprocess.run(command, check=False).returncode
    outcomes = outcomes_of(RESULTS) if RESULTS.exists() else Counter[str]()
    if status != 0 and outcomes["failed"] == 0:
        outcomes["failed"] = 1
    return outcomes


def run_ill_fitting(python: Sequence[str], seed: int, cases: int) -> Counter[str]:
    """Runs ops with operands that don't fit; see tests/ops/ill_fitting.py."""
    log = ROOT / "build" / "sanitize.log"
    arguments = ["--memory", "0", "--seed", str(seed), "--cases", str(cases), "--log", str(log)]
    command = [*python, "-m", "tests.ops.ill_fitting", *arguments]
    done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    print(done.stderr, file=sys.stderr)
    found = re.search(r"(\d+) cases in .*, (\d+) wrong", done.stderr)
    if found is None:
        print(*log.read_text().splitlines()[-1:], sep="\n", file=sys.stderr)
        return Counter(failed=1)
    wrong = int(found[2])
    return +Counter(passed=int(found[1]) - wrong, failed=wrong or int(done.returncode != 0))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", required=True, help="runs Python with csrc under AddressSanitizer")
    parser.add_argument("--cases", type=int, default=5000, help="operands that don't fit")
    parser.add_argument("--seed", type=int, required=True, help="of the first of them")
    chosen = parser.parse_args(arguments)
    sanitized = shlex.split(chosen.python)
    start, outcomes = time.monotonic(), dict[str, Counter[str]]()
    for what, (under, tests) in PARTS.items():
        if (ROOT / tests[0]).exists():
            print(f"== {what}", flush=True)
            outcomes[what] = run_pytest(sanitized if under else [sys.executable], tests)
    print(f"== {ILL_FITTING}", flush=True)
    outcomes[ILL_FITTING] = run_ill_fitting(sanitized, chosen.seed, chosen.cases)
    seconds = time.monotonic() - start
    for what, ends in outcomes.items():
        print(f"{what}: {dict(ends)}")
    print(f"{seconds:.0f} s")
    record("sanitize", outcomes, seconds, chosen.seed)
    return int(any(ends["failed"] for ends in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
