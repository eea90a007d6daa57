"""Everything that a machine with a GPU should run, within a deadline: ``python -m benchmarks.gpu OUT [STAGE ...]``.

STAGE is the name of a stage or of a call, which is a group of stages (default: first). A stage runs in processes of
its own and is ended at its limit or at the deadline; one that fails does not keep the next from running, and one for
which too little time is left is skipped. Each prints one line: what came of it, seconds, and the last line of its
output. Results are written to OUT as they come, logs to OUT/logs.tar.gz after each stage; OUT never holds more than
eight files.

Carry build/gpu-bundle.tar.xz (``make gpu-bundle``) along: nothing has to be compiled before the first step, and pytest
is there. On another machine of the same kind OUT/tuned.json saves the search: copy it to
resnet_fused/kernels/tuned/h100.json.

Exit status: 0 all passed, 1 a stage failed or was skipped, 2 misuse, 3 no GPU, 128 + N ended by signal N.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "build" / "gpu-bundle.tar.xz"
#: Python packages of a bundle.
TOOLS_FOLDER = "build/gpu-python"
#: A call of ten minutes, less what starting, ending the last stage and archiving take.
SECONDS = 560
#: Between an interrupt, on which a program writes what it has, and its end.
GRACE = 5.0
#: Without a bundle the extension is compiled.
BUILD_SECONDS = 240


@dataclass(frozen=True)
class Stage:
    """One line of the result.

    Args:
        seconds: that it may take; least: below which it is not started.
        commands: one after the other, as ``python -m`` takes them, after variables of their environment;
            {out} and {logs} are the folders of results and logs.
    """

    name: str
    seconds: int
    commands: tuple[str, ...]
    least: int = 10

    def runs(self, **folders: Path) -> list[tuple[dict[str, str], list[str]]]:
        """Of each command the variables and the words after ``python -m``."""
        found = []
        for text in self.commands:
            words = [word.format_map(folders) for word in shlex.split(text)]
            variables = list(itertools.takewhile(lambda word: "=" in word, words))
            found.append((dict(pair.split("=", 1) for pair in variables), words[len(variables) :]))
        return found


def _stage(name: str, seconds: int, *commands: str, least: int = 10) -> Stage:
    return Stage(name, seconds, commands, least)


_CEILINGS = "--ceilings {out}/environment.json"
_KERNELS = f"tools.kernel_times {_CEILINGS}"
_RECORD = f"benchmarks.record {_CEILINGS} --json {{out}}/record.json"
_PYTEST = "pytest -q -m gpu -p no:cacheprovider"
#: With every kernel of ours, and nothing measured. Most of the time of a test is compiling on the CPU.
_TESTS = f"RESNET_FUSED_BACKEND=triton {_PYTEST} -n 12 --maxfail=50 --junitxml={{logs}}/tests.xml"

#: Stages by the call that runs them.
CALLS: dict[str, tuple[Stage, ...]] = {
    "first": (
        _stage("environment", 30, "benchmarks.gpu_stages environment {out}"),
        _stage("load", 20, "benchmarks.gpu_stages load {out}"),
        _stage("tune", 115, "benchmarks.gpu_stages tune {out}", least=20),
        _stage("record", 170, f"{_RECORD} --name record", least=60),
        _stage(
            "kernels",
            75,
            f"{_KERNELS} --backend auto --json {{logs}}/kernels-auto.json",
            f"{_KERNELS} --backend triton --json {{logs}}/kernels-triton.json",
            least=20,
        ),
        _stage("profile", 55, "benchmarks.gpu_stages profile {logs}", least=30),
        _stage(
            "tests",
            95,
            f"{_TESTS} tests/kernels tests/ops/test_accuracy.py tests/ops/test_residual_block.py",
            least=30,
        ),
    ),
    "second": (
        _stage("capture", 60, f"{_PYTEST} -k 'captured or graphed' tests/kernels"),
        _stage("sanitize", 120, "benchmarks.gpu_stages sanitize {logs}", least=40),
    ),
    "third": (
        _stage(
            "autotune",
            300,
            f"{_RECORD} --name autotune --providers resnet_fused eager_channels_last compile_max_autotune",
            least=120,
        ),
        _stage("batch400", 200, f"{_RECORD} --name batch400 --batch 400", least=60),
        _stage("resnet18", 150, f"{_RECORD} --name resnet18 --arch resnet18", least=60),
        _stage(
            "train",
            240,
            "resnet_fused train --impl compare --data digits --precision bf16 --out {logs}/train --overwrite",
            least=60,
        ),
    ),
}


class Stopped(Exception):
    """Someone asked for the end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by signal {number}")
        self.number = number


def chosen(names: Sequence[str]) -> list[Stage]:
    """The stages of some names, in the order given; those of the first call without any.

    Raises:
        ValueError: there is no such stage or call.
    """
    known = {stage.name: (stage,) for stages in CALLS.values() for stage in stages} | CALLS
    for name in names:
        if name not in known:
            raise ValueError(f"unknown stage {name}: choose some of {', '.join(known)}")
    return [
        replace(s, seconds=BUILD_SECONDS) if s.name == "load" and not BUNDLE.exists() else s
        for name in names or ["first"]
        for s in known[name]
    ]


def plan() -> str:
    """The stages of each call with their seconds."""
    lines = []
    for call in CALLS:
        stages = chosen([call])
        lines += [f"{call:12}{sum(stage.seconds for stage in stages):5} s"]
        lines += [f"  {stage.name:12}{stage.seconds:3} s" for stage in stages]
    if not BUNDLE.exists():
        lines.append(
            f"load would take 20 s, not {BUILD_SECONDS}, with {BUNDLE.relative_to(ROOT)}: make gpu-bundle"
        )
    return "\n".join(lines)


def has_gpu() -> bool:
    """Whether the driver is there and finds a GPU; cheaper than asking torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def environment() -> dict[str, str]:
    """Of every stage. Caches lie in build/, so that a second call on the same machine finds them."""
    cache = ROOT / "build" / "gpu-cache"
    added = {
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / TOOLS_FOLDER}",
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(cache)),
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(cache / "triton")),
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor")),
        "PATH": f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin",
    }
    # nvcc on PATH may be a script that lies elsewhere than its libraries.
    if Path("/usr/local/cuda/bin/nvcc").exists():
        added["CUDA_HOME"] = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ | added


class Runner:
    """Runs stages one after the other until a deadline.

    Args:
        out: where results go.
        seconds: from now to the deadline.
        dry: commands are only shown.
    """

    def __init__(self, out: Path, seconds: float, dry: bool) -> None:
        self.out, self.dry = out, dry
        self.deadline = time.monotonic() + seconds
        self.logs = Path(tempfile.mkdtemp(prefix="resnet_fused_gpu_"), "logs")
        self.logs.mkdir()
        self.lines: list[str] = []

    def run(self, stages: Sequence[Stage]) -> int:
        """The exit status."""
        status = 0
        for stage in stages:
            left = self.deadline - time.monotonic()
            if left < min(stage.least, stage.seconds):
                self.tell(
                    stage.name, "skipped", 0.0, f"{max(left, 0.0):.0f} s are left, it needs {stage.least}"
                )
                status = 1
                continue
            begin = time.monotonic()
            word, figure = "stopped", ""
            try:
                word, figure = self.stage(stage, min(stage.seconds, left))
            finally:
                self.tell(stage.name, word, time.monotonic() - begin, figure)
                self.archive(stage.name)
            status |= word != "passed"
        return status

    def stage(self, stage: Stage, seconds: float) -> tuple[str, str]:
        """What came of it, and the last line of each command's output."""
        end, word, figures = time.monotonic() + seconds, "passed", []
        with open(self.out / "current.log", "w+b") as log:
            for variables, words in stage.runs(out=self.out, logs=self.logs):
                command = [sys.executable, "-m", *words]
                log.write(f"$ {shlex.join(command)} {variables or ''}\n".encode())
                log.flush()
                if self.dry:
                    command = ["echo", "would run", *command[1:]]
                begin = log.tell()
                code = _run(
                    command, max(end - time.monotonic(), 0.1), log.fileno(), environment() | variables
                )
                log.seek(begin)
                lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
                figures.append(next((line for line in reversed(lines) if line), ""))
                if code is None:
                    return "timeout", "; ".join(figures)
                if code != 0:
                    word = "failed"
        return word, "; ".join(figures)

    def tell(self, name: str, word: str, seconds: float, figure: str) -> None:
        self.lines.append(f"{name:12} {word:8} {seconds:6.1f} s  {figure}".rstrip())
        print(self.lines[-1], flush=True)
        (self.out / "summary.txt").write_text("\n".join(self.lines) + "\n")

    def archive(self, name: str) -> None:
        """Everything in the folder of logs so far; checkpoints are large, and of no use once their run is compared."""
        current, archive = self.out / "current.log", self.out / "logs.tar.gz"
        if current.exists():
            shutil.move(current, self.logs / f"{name}.log")
        for path in self.logs.rglob("*.pt"):
            path.unlink()
        with tarfile.open(archive.with_suffix(".tmp"), "w:gz") as tar:
            tar.add(self.logs, "logs")
        archive.with_suffix(".tmp").replace(archive)

    def close(self) -> None:
        shutil.rmtree(self.logs.parent, ignore_errors=True)


def _run(command: Sequence[str], seconds: float, log: int, variables: Mapping[str, str]) -> int | None:
    """The exit status of a command, None if it had to be ended; nothing that it has started is left."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        preexec_fn=os.setpgrp,  # a group of its own, but not a session: whoever ends ours ends it too
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _stop(number: int, frame: FrameType | None) -> None:
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)  # what is written at the end is written once
    raise Stopped(number)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="folder of the results")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="of stages or calls (default: first)")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"to the deadline (default: {SECONDS})"
    )
    parser.add_argument("--plan", action="store_true", help="show the stages and their seconds")
    parser.add_argument("--dry-run", action="store_true", help="show the commands, without a GPU")
    options = parser.parse_args(arguments)
    if options.plan:
        print(plan())
        return 0
    if options.out is None:
        parser.error("OUT is missing: name a folder")
    try:
        stages = chosen(options.stages)
    except ValueError as error:
        parser.error(str(error))
    if not options.dry_run and not has_gpu():
        print(
            "benchmarks.gpu needs an NVIDIA GPU and its driver, and finds none; try --dry-run",
            file=sys.stderr,
        )
        return 3
    options.out.mkdir(parents=True, exist_ok=True)
    runner = Runner(options.out.absolute(), options.seconds, options.dry_run)
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return runner.run(stages)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.number
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        runner.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
