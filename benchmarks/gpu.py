"""Everything that a machine with a GPU should run, within a deadline: ``python -m benchmarks.gpu OUT [STAGE ...]``.

STAGE is the name of a stage or of a call, which is a group of stages (default: first). A stage runs in processes of
its own and is ended at its limit or at the deadline; after one that fails the next runs, and one for which too little
time is left is skipped. Each prints one line: the outcome, seconds, and the last line of its output. Results are
written to OUT as they come, logs to OUT/logs.tar.gz after each stage; OUT never holds more than eight files.

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
from collections.abc import Iterator, Mapping, Sequence
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
#: Of the stage load without a bundle: the extension is compiled.
BUILD_SECONDS = 240


@dataclass(frozen=True)
class Stage:
    """One line of the result.

    Args:
        call: a group of stages that one run has time for.
        seconds: its limit; least: below which it is not started.
        commands: one after the other, as ``python -m`` takes them, after variables of their environment;
            {out} and {logs} are the folders of results and logs.
    """

    call: str
    name: str
    seconds: int
    least: int
    commands: tuple[str, ...]

    def runs(self, **folders: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
        """Of each command the variables and the words after ``python -m``."""
        for text in self.commands:
            words = [word.format_map(folders) for word in shlex.split(text)]
            variables = list(itertools.takewhile(lambda word: "=" in word, words))
            yield dict(pair.split("=", 1) for pair in variables), words[len(variables) :]


_CEILINGS = "--ceilings {out}/environment.json"
_KERNELS = f"tools.kernel_times {_CEILINGS} --json {{logs}}/kernels"
_RECORD = f"benchmarks.record {_CEILINGS} --json {{out}}/record.json"
_PROVIDERS = "--providers resnet_fused eager_channels_last compile_max_autotune"
_PYTEST = "pytest -q -m gpu -p no:cacheprovider"
#: With every kernel of ours, and nothing measured. Most of the time of a test is compiling on the CPU.
_TESTS = f"RESNET_FUSED_BACKEND=triton {_PYTEST} -n 12 --maxfail=50 --junitxml={{logs}}/tests.xml"
_TESTED = "tests/kernels tests/ops/test_accuracy.py tests/ops/test_residual_block.py"
_TRAIN = "resnet_fused train --impl compare --data digits --precision bf16 --out {logs}/train --overwrite"

STAGES = (
    Stage("first", "environment", 30, 10, ("benchmarks.gpu_stages environment {out}",)),
    Stage("first", "load", 20, 10, ("benchmarks.gpu_stages load {out}",)),
    Stage("first", "tune", 115, 20, ("benchmarks.gpu_stages tune {out}",)),
    Stage("first", "record", 170, 60, (f"{_RECORD} --name record",)),
    Stage(
        "first",
        "kernels",
        75,
        20,
        tuple(f"{_KERNELS}-{each}.json --backend {each}" for each in ("auto", "triton")),
    ),
    Stage("first", "profile", 55, 30, ("benchmarks.gpu_stages profile {logs}",)),
    Stage("first", "tests", 95, 30, (f"{_TESTS} {_TESTED}",)),
    Stage("second", "capture", 60, 10, (f"{_PYTEST} -k 'captured or graphed' tests/kernels",)),
    Stage("second", "sanitize", 120, 40, ("benchmarks.gpu_stages sanitize {logs}",)),
    Stage("third", "autotune", 300, 120, (f"{_RECORD} --name autotune {_PROVIDERS}",)),
    Stage("third", "batch400", 200, 60, (f"{_RECORD} --name batch400 --batch 400",)),
    Stage("third", "resnet18", 150, 60, (f"{_RECORD} --name resnet18 --arch resnet18",)),
    Stage("third", "train", 240, 60, (_TRAIN,)),
)


def chosen(names: Sequence[str]) -> list[Stage]:
    """The stages of some names of stages and calls, in the order given.

    Raises:
        ValueError: there is no such stage or call.
    """
    if unknown := [name for name in names if not any(name in (s.name, s.call) for s in STAGES)]:
        known = dict.fromkeys([s.name for s in STAGES] + [s.call for s in STAGES])
        raise ValueError(f"unknown stage {unknown[0]}: choose some of {', '.join(known)}")
    found = [stage for name in names for stage in STAGES if name in (stage.name, stage.call)]
    if BUNDLE.exists():
        return found
    return [replace(s, seconds=BUILD_SECONDS) if s.name == "load" else s for s in found]


def plan() -> str:
    """The stages of each call with their seconds."""
    lines = []
    for call in dict.fromkeys(stage.call for stage in STAGES):
        stages = chosen([call])
        lines += [f"{call:12}{sum(stage.seconds for stage in stages):5} s"]
        lines += [f"  {stage.name:12}{stage.seconds:3} s" for stage in stages]
    if not BUNDLE.exists():
        lines.append(f"load would be faster with {BUNDLE.relative_to(ROOT)}: make gpu-bundle")
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
    defaults = {
        "XDG_CACHE_HOME": str(cache),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    }
    # nvcc on PATH may be a script that lies elsewhere than its libraries.
    if Path("/usr/local/cuda/bin/nvcc").exists():
        defaults["CUDA_HOME"] = "/usr/local/cuda"
    return {
        **defaults,
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / TOOLS_FOLDER}",
        "PATH": f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin",
    }


class Runner:
    """Runs stages one after the other until a deadline.

    Args:
        out, logs: folders of results and of logs.
        seconds: from now to the deadline.
        dry: commands are only shown.
    """

    def __init__(self, out: Path, logs: Path, seconds: float, dry: bool) -> None:
        self.out, self.logs, self.dry = out, logs, dry
        self.deadline = time.monotonic() + seconds
        self.lines: list[str] = []

    def run(self, stages: Sequence[Stage]) -> int:
        """The exit status."""
        status = 0
        for stage in stages:
            begin = time.monotonic()
            left = self.deadline - begin
            word, figure = "stopped", ""
            try:
                if left < min(stage.least, stage.seconds):
                    word, figure = "skipped", f"{max(left, 0.0):.0f} s are left, it needs {stage.least}"
                else:
                    word, figure = self.run_stage(stage, min(stage.seconds, left))
            finally:
                line = f"{stage.name:12} {word:8} {time.monotonic() - begin:6.1f} s  {figure}".rstrip()
                print(line, flush=True)
                self.lines.append(line)
                (self.out / "summary.txt").write_text("\n".join(self.lines) + "\n")
                self.archive(stage.name)
            status |= word != "passed"
        return status

    def run_stage(self, stage: Stage, seconds: float) -> tuple[str, str]:
        """The outcome, and the last line of each command's output."""
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

    def archive(self, name: str) -> None:
        """All logs so far, without checkpoints: they are large, and not needed once their run is compared."""
        current, archive = self.out / "current.log", self.out / "logs.tar.gz"
        if current.exists():
            shutil.move(current, self.logs / f"{name}.log")
        for path in self.logs.rglob("*.pt"):
            path.unlink()
        with tarfile.open(archive.with_suffix(".tmp"), "w:gz") as tar:
            tar.add(self.logs, "logs")
        archive.with_suffix(".tmp").replace(archive)


def _run(command: Sequence[str], seconds: float, log: int, variables: Mapping[str, str]) -> int | None:
    """The exit status of a command, None if it had to be ended; all processes that it has started are ended."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        preexec_fn=os.setpgrp,  # a group of its own, but not a session: what ends this session ends it too
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


@contextlib.contextmanager
def _exit_on_signals() -> Iterator[None]:
    """SIGTERM and SIGINT raise SystemExit, once, so that what is written at the end is written."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        print(f"ended by signal {number}", file=sys.stderr)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="folder of the results")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="stages or calls (default: first)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"(default: {SECONDS})")
    parser.add_argument("--plan", action="store_true", help="show the stages and their seconds")
    parser.add_argument("--dry-run", action="store_true", help="show the commands, without a GPU")
    options = parser.parse_args(arguments)
    if options.plan:
        print(plan())
        return 0
    if options.out is None:
        parser.error("OUT is missing: name a folder")
    try:
        stages = chosen(options.stages or ["first"])
    except ValueError as error:
        parser.error(str(error))
    if not options.dry_run and not has_gpu():
        print("benchmarks.gpu finds no NVIDIA GPU and driver; try --dry-run", file=sys.stderr)
        return 3
    options.out.mkdir(parents=True, exist_ok=True)
    with _exit_on_signals(), tempfile.TemporaryDirectory(prefix="resnet_fused_gpu_") as folder:
        return Runner(options.out.absolute(), Path(folder), options.seconds, options.dry_run).run(stages)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
