"""Everything that needs a GPU, within a time limit: ``python -m benchmarks.gpu OUT [STAGE ...]``.

A stage is a shell command with a limit of its own (default: all of ``STAGES``, in this order). It is ended at its limit
or when the time is over; after one that fails the next runs, and one that has less than half of its limit left is
skipped. Each prints one line: the outcome, seconds, and the last line of its output. Results are written to OUT as
they come, the output of a stage to OUT/STAGE.log.

Carry build/gpu-bundle.tar.xz (``make gpu-bundle``) along: then nothing has to be compiled before the first step, and
pytest is there. On another machine of the same kind OUT/tuned.json saves the search: copy it to
resnet_fused/kernels/tuned/h100.json.

Exit status: 0 all passed, 1 a stage failed or was skipped, 2 misuse or no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from glob import glob
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
#: From ROOT; a bundle holds files of these folders, and the extension.
BUNDLE, CACHE, TOOLS = "build/gpu-bundle.tar.xz", "build/gpu-cache", "build/gpu-python"
#: A call of ten minutes, less what starting and ending the last stage take.
SECONDS = 560
#: Between an interrupt, on which a program writes what it has, and its end.
GRACE = 5.0

_EXTENSION_LOADS = (
    "$PYTHON -c 'import sys; from resnet_fused.backend import why_not_native as why; sys.exit(why(\"cuda\"))'"
)
_LAUNCHES = "$PYTHON -m tools.kernel_times"
_PYTEST = "$PYTHON -m pytest -q -p no:cacheprovider"
#: With every kernel of ours, and nothing measured. Most of the time of a test is compiling on the CPU.
_TESTS = f'RESNET_FUSED_BACKEND=triton {_PYTEST} -m gpu -n 12 --maxfail=50 --junitxml="$OUT/tests.xml"'
#: The clocks stay as they are: they are the machine's, not ours.
_NCU = (
    'ncu --profile-from-start off --clock-control none --force-overwrite --export "$OUT/profile"'
    " --section SpeedOfLight --section WarpStateStats --section MemoryWorkloadAnalysis --section Occupancy"
    " --section SourceCounters --section LaunchStats"
)
_MEMCHECK = (
    "PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --print-limit 20 --error-exitcode 1"
)
#: Every kernel is in one of these blocks.
_BLOCKS = "$PYTHON -m tests.gpu_small triton bottleneck_downsample basic_block"


def _models(name: str, impls: str = "eager_channels_last", arch: str = "resnet50", batch: int = 256) -> str:
    """Training steps, checked and timed, as a file for benchmarks/results."""
    return (
        f"RESNET_FUSED_BENCH_BATCH={batch} {_PYTEST} benchmarks/test_models.py -k {arch}-train --device cuda"
        f' --dtypes bf16 --impls {impls} --results "$OUT/{name}.json"'
    )


#: The most seconds of each stage, and its command.
STAGES = {
    "load": (
        240,
        f"if [ -e {BUNDLE} ]; then $PYTHON -m benchmarks.gpu_bundle load {BUNDLE}; fi;"
        f" {_EXTENSION_LOADS} || {{ $PYTHON setup.py -q build_ext --inplace && {_EXTENSION_LOADS}; }}",
    ),
    "environment": (30, "nvidia-smi; $PYTHON -m resnet_fused info; $PYTHON -m benchmarks.roofline --measure"),
    "tune": (115, f'{_LAUNCHES} --tune "$OUT/tuned.json"'),
    "models": (120, _models("models")),
    "kernels": (75, f"{_LAUNCHES} --backend auto && {_LAUNCHES} --backend triton"),
    "profile": (
        80,
        f'{_NCU} {_LAUNCHES} --profile && ncu --import "$OUT/profile.ncu-rep" --page source --csv | gzip'
        ' > "$OUT/profile.csv.gz"; ncu --import "$OUT/profile.ncu-rep" --page details',
    ),
    "tests": (95, f"{_TESTS} tests/kernels tests/ops/test_accuracy.py tests/ops/test_residual_block.py"),
    "compiled": (200, _models("compiled", "eager_channels_last,compile_default")),
    "capture": (90, f"{_PYTEST} -m gpu -k 'captured or graphed' tests/kernels tests/test_captured_steps.py"),
    # Without the checker first: what Triton compiles now, the checked run finds in its cache.
    "sanitize": (120, f"{_BLOCKS} && {_MEMCHECK} {_BLOCKS}"),
    "autotune": (300, _models("autotune", "eager_channels_last,compile_max_autotune")),
    "batch400": (200, _models("batch400", batch=400)),
    "resnet18": (150, _models("resnet18", arch="resnet18")),
}


def environment(out: Path) -> dict[str, str]:
    """Of every stage. Caches lie in the folder of bundles, so that a second call on the same machine finds them."""
    folders = [*glob("/opt/nvidia/nsight-compute/*"), "/usr/local/cuda/bin"]  # not always on PATH
    variables = {
        "XDG_CACHE_HOME": f"{ROOT}/{CACHE}",
        "TORCHINDUCTOR_CACHE_DIR": f"{ROOT}/{CACHE}/inductor",
        **os.environ,
        "TRITON_CACHE_DIR": f"{ROOT}/{CACHE}/triton",  # where a bundle has its kernels
        "PATH": os.pathsep.join([os.environ.get("PATH", ""), *folders]),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/{TOOLS}",
        "PYTHONUNBUFFERED": "1",
        "PYTHON": sys.executable,
        "OUT": str(out),
    }
    # nvcc on PATH may be a script that lies elsewhere than its libraries.
    if Path("/usr/local/cuda/bin/nvcc").exists():
        variables.setdefault("CUDA_HOME", "/usr/local/cuda")
    return variables


def run(command: str, seconds: float, out: Path, log: Path) -> str:
    """The outcome of a command; all processes that it has started are ended."""
    with open(log, "wb") as output:
        process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=ROOT,
            env=environment(out),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,  # its own, but not a session: what ends this session ends it too
        )
    try:
        return "failed" if process.wait(seconds) else "passed"
    except subprocess.TimeoutExpired:
        return "timeout"
    finally:
        with contextlib.suppress(ProcessLookupError):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the results")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"some of {', '.join(STAGES)} (all)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all of them ({SECONDS})")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.stages if name not in STAGES]:
        parser.error(f"unknown stage {unknown[0]}: choose some of {', '.join(STAGES)}")
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU")
    deadline = time.monotonic() + options.seconds
    # As an interrupt: the stage that runs is ended, and what it has written stays.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    status = 0
    for name in options.stages or STAGES:
        seconds, command = STAGES[name]
        begin = time.monotonic()
        left = deadline - begin
        log = out / f"{name}.log"
        if left < seconds / 2:
            outcome, last = "skipped", [f"{max(left, 0):.0f} s are left of {seconds}"]
        else:
            outcome = run(command, min(seconds, left), out, log)
            last = log.read_text(errors="replace").split("\n")[-2:-1]
        print(f"{name:12} {outcome:8} {time.monotonic() - begin:6.1f} s  {''.join(last)}", flush=True)
        status |= outcome != "passed"
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
