"""Whether the tests notice faults: plants one at a time in a copy of the code, and runs the tests that should fail.

    python -m tools.mutants [WORD ...]

The faults are those of tools/mutants_list.py; words choose the ones whose names contain one of them. A fault is
*killed* if a test fails, or if the tests crash or never end. It *survived* if they pass: then a test is missing. It is
*broken* if the tests could not be run with it, as where it is a syntax error: then the list has to be mended. Ends with
status 1 unless all are killed.

The copy, build/mutants, has an extension of its own, and stays, so that a later run compiles what has changed.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.page import ROOT
from tools.mutants_list import MUTANTS, Mutant
from tools.reliability import record

COPY = ROOT / "build" / "mutants"
#: What a run leaves in the copy that is not a copy.
_MADE = ("build", "resnet_fused/_C.abi3.so", "resnet_fused/_build.json")
#: Seconds after which tests count as hung; without a fault they take up to 30.
LIMIT = 180


class Verdict(NamedTuple):
    """How the tests ended with a fault: "killed", "survived" or "broken", and by what or why."""

    outcome: str
    detail: str


def copy_tree() -> None:
    """Brings the copy up to date. Files that have not changed keep their time, and are not compiled again."""
    listed = _run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT).stdout
    names = {name for name in listed.split("\0") if (ROOT / name).is_file()}
    for name in names:
        source, copied = ROOT / name, COPY / name
        if not (copied.is_file() and filecmp.cmp(source, copied, shallow=False)):
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copied)
    for copied in COPY.rglob("*"):
        name = str(copied.relative_to(COPY))
        if copied.is_file() and name not in names and not name.startswith(_MADE):
            copied.unlink()


def build() -> str | None:
    """Compiles the copy's extension; what the compiler said where that fails."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = _run(command, COPY, os.environ | {"RESNET_FUSED_BUILD": "cpu"})
    return (done.stdout + done.stderr).strip() if done.returncode else None


def _run(
    command: Sequence[str],
    folder: Path,
    environment: dict[str, str] | None = None,
    limit: float | None = None,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=limit)


def run_tests(tests: str, interpreted: bool) -> Verdict:
    """Runs the tests of a fault in the copy, up to the first that fails."""
    options = ["-x", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {
        # Files of one size that change within a second would be taken for their older bytecode.
        "PYTHONDONTWRITEBYTECODE": "1",
        # Of programs that tests start in another folder.
        "PYTHONPATH": str(COPY),
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",
        "RESNET_FUSED_TEST_SEED": "0",
    }
    environment.pop("RESNET_FUSED_RECORD", None)
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
        options += ["-m", "interpreter"]
    command = [sys.executable, "-m", "pytest", *options, *shlex.split(tests)]
    try:
        done = _run(command, COPY, environment, LIMIT)
    except subprocess.TimeoutExpired:
        return Verdict("killed", f"the tests did not end within {LIMIT} s")
    return verdict(done.returncode, done.stdout + done.stderr)


def verdict(status: int, output: str) -> Verdict:
    """What pytest's exit status and output say of a fault."""
    if status == 0:
        passed = re.search(r"(\d+) passed", output)
        return Verdict("survived", f"{passed[1]} passed") if passed else Verdict("broken", "no test ran")
    if status == 1:
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        return Verdict("killed", failed[1] if failed else "a test failed")
    if status < 0:
        return Verdict("killed", f"the tests crashed with signal {-status}")
    reason = [line for line in output.splitlines() if line.strip()][-1:]
    return Verdict("broken", f"pytest ended with status {status}: {' '.join(reason)}")


def plant(mutant: Mutant) -> Verdict:
    """Tries one fault in the copy, which is as it was afterwards but for the extension."""
    path = COPY / mutant.file
    original = path.read_text()
    path.write_text(mutant.planted_in(original))
    try:
        if mutant.is_compiled and (problem := build()):
            errors = re.findall(r"^.*\berror\b.*$", problem, re.MULTILINE)
            return Verdict("broken", f"does not compile: {(errors or [problem])[0]}")
        return run_tests(mutant.tests, mutant.interpreted)
    finally:
        path.write_text(original)


def check_original(mutants: Sequence[Mutant]) -> list[str]:
    """Which of the faults' tests do not pass in the code as it is."""
    problems = []
    for tests, interpreted in dict.fromkeys((mutant.tests, mutant.interpreted) for mutant in mutants):
        start = time.monotonic()
        outcome, detail = run_tests(tests, interpreted)
        print(f"  {time.monotonic() - start:5.1f} s  {tests}: {detail}", flush=True)
        if outcome != "survived":
            problems.append(f"{tests}: {detail}")
    return problems


def main(words: Sequence[str]) -> int:
    start = time.monotonic()
    chosen = {
        area: [m for m in mutants if not words or any(word in m.name for word in words)]
        for area, mutants in MUTANTS.items()
    }
    # Python first; then file by file, so that a header is compiled once for each of its faults.
    everything = sorted((m for mutants in chosen.values() for m in mutants), key=lambda m: m.build_order)
    if not everything:
        sys.exit(f"no fault is named so: {' '.join(words)}")
    copy_tree()
    if problem := build():
        sys.exit(f"the code does not compile: {problem}")
    print(f"without a fault, {COPY}:", flush=True)
    if problems := check_original(everything):
        sys.exit("tests fail without a fault:\n" + "\n".join(problems))
    verdicts: dict[str, Verdict] = {}
    for i, mutant in enumerate(everything):
        begin = time.monotonic()
        verdicts[mutant.name] = plant(mutant)
        outcome, detail = verdicts[mutant.name]
        took = f"{time.monotonic() - begin:5.1f} s"
        print(f"{i + 1:3}/{len(everything)} {took} {outcome:8} {mutant.name}: {detail}", flush=True)
    outcomes = report(chosen, verdicts)
    seconds = time.monotonic() - start
    total = sum(outcomes.values(), Counter())
    counts = ", ".join(f"{count} {outcome}" for outcome, count in total.items())
    print(f"\n{counts}, {seconds / 60:.1f} minutes")
    if not words:
        record("mutants", outcomes, seconds)
    return 0 if set(total) == {"killed"} else 1


def report(chosen: dict[str, list[Mutant]], verdicts: dict[str, Verdict]) -> dict[str, Counter[str]]:
    """Prints a table of the verdicts, and counts them for each area."""
    outcomes: dict[str, Counter[str]] = {}
    print(f"\n{'outcome':8} {'fault':72} by")
    for area, mutants in chosen.items():
        for mutant in mutants:
            outcome, detail = verdicts[mutant.name]
            outcomes.setdefault(area, Counter())[outcome] += 1
            print(f"{outcome:8} {mutant.name:72} {detail}")
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="part of the names of the faults to plant")
    sys.exit(main(parser.parse_args().words))
