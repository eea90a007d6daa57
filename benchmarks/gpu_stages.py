"""Stages of ``benchmarks.gpu`` that are no command of their own: ``python -m benchmarks.gpu_stages STAGE FOLDER``.

The last line that a stage prints is what the runner shows of it. Nothing but torch and Triton has to be installed.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import Any

from benchmarks.gpu import BUNDLE, ROOT

ARCH, BATCH, DTYPE = "resnet50", 256, "bf16"
#: Kernels that Nsight Compute profiles, each in its launch with most operations: of conv, dgrad and wgrad a 3x3.
PROFILED = ("conv_bn_stats", "dgrad", "wgrad", "conv1x1_bn_add_relu", "folded_dgrad", "folded_wgrad")
SECTIONS = ("SpeedOfLight", "WarpStateStats", "MemoryWorkloadAnalysis")
#: Blocks of tests.gpu_small: every kernel is in one of them.
SANITIZED = ("bottleneck_downsample", "basic_block")
#: Rows and columns of matrices whose product is bound by the tensor cores.
SIZE = 8192


@contextmanager
def compilations() -> Iterator[Callable[[], str]]:
    """Counts kernels of resnet_fused that Triton finds in its cache and that it compiles; the result says how many."""
    from triton import knobs

    hits, compiled, microseconds = 0, 0, 0

    def listen(*, src: Any, cache_hit: bool, times: Any, **_: Any) -> None:
        nonlocal hits, compiled, microseconds
        if not str(getattr(getattr(src, "fn", None), "module", "")).startswith("resnet_fused"):
            return
        hits, compiled = hits + cache_hit, compiled + (not cache_hit)
        microseconds += 0 if cache_hit else times.total

    before, knobs.compilation.listener = knobs.compilation.listener, listen
    try:
        yield lambda: f"cache hits {hits} of {hits + compiled}, {microseconds / 1e6:.0f} s compiling"
    finally:
        knobs.compilation.listener = before


def environment(out: Path, name: str = "cuda") -> int:
    """Versions, and this device's ceilings, which later stages read."""
    import torch

    from benchmarks.roofline import fastest_seconds, measure
    from resnet_fused.measure import header

    begun = time.monotonic()
    print(platform.platform(), f"{os.cpu_count()} processors")
    if find_tool("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False)
    for tool in ("nvcc", "ncu", "compute-sanitizer"):
        print(f"{tool}: {find_tool(tool) or 'not installed'}")
    device = torch.device(name)
    before = header(device, 0.0)
    convs = measure(DTYPE, device)
    a, b = (torch.randn(SIZE, SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * SIZE**3 / fastest_seconds(lambda: a @ b, device)
    ceilings = {DTYPE: {"bandwidth": convs.bandwidth, "flops": max(convs.flops, matmul)}}
    after = header(device, time.monotonic() - begun, ceilings)
    clocks = [before["clocks"], after["clocks"]]
    rates = {"matmul_flops": matmul, "conv_flops": convs.flops}
    found = {"header": after, "clocks": clocks, "ceilings": ceilings, **rates}
    (out / "environment.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(after))
    print(
        f"{after['device']}, driver {after['driver']}, torch {after['torch']}, triton {after['triton']}; copy"
        f" {convs.bandwidth / 1e12:.2f} TB/s, bf16 matmul {matmul / 1e12:.0f} TFLOP/s, convolution"
        f" {convs.flops / 1e12:.0f}; clocks {clocks}"
    )
    return 0


def load(out: Path) -> int:
    """Extracts the bundle, or compiles the extension; then the package has to load."""
    from benchmarks.gpu_bundle import EXTENSION, build_extension, differences, extract

    notes = ["no bundle"]
    if BUNDLE.exists():
        cache = Path(os.environ["TRITON_CACHE_DIR"])
        manifest = extract(BUNDLE, cache, ROOT)
        counts = [len(list(cache.glob(f"*/{name}"))) for name in ("*.cubin", "__triton_launcher*.so")]
        notes = [f"{counts[0]} kernels, {counts[1]} launchers", *differences(manifest)]
    status, why = _info()
    if status != 0:
        print(f"the extension is compiled here: {why}", flush=True)
        shutil.copy(build_extension(ROOT / "build" / "gpu-extension"), ROOT / EXTENSION)
        status, why = _info()
        notes.append("extension compiled here")
    print("; ".join([*notes, why or "extension loads, with CUDA"]))
    return status


def _info() -> tuple[int, str]:
    """Whether the package has its CUDA kernels, in a process that has not tried before; and why not."""
    code = (
        "from resnet_fused.backend import why_not_native; from resnet_fused.cli.info import info; info();"
        " why = why_not_native('cuda'); print(why or ''); raise SystemExit(why is not None)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    print(done.stdout)
    return done.returncode, (done.stdout.splitlines() or [""])[-1]


def tune(out: Path) -> int:
    """Checks and times all configurations of a step; writes the table of the fastest, also if interrupted."""
    import torch

    from resnet_fused.kernels.autotune import search
    from tools.kernel_times import make_step

    begun = time.monotonic()
    with compilations() as compiled:
        try:
            make_step(ARCH, BATCH, 224, DTYPE, torch.device("cuda"))()
            torch.cuda.synchronize()
        finally:
            search.write_table(out / "tuned.json")
            for problem, config, ms in search.entries():
                print(problem, config or "vendor", ms)
            found = ", ".join(f"{name} {count}" for name, count in search.summary().items())
            print(f"{found}; {compiled()}; {time.monotonic() - begun:.0f} s", flush=True)
    return 0


def launch_profiled(logs: Path) -> int:
    """Runs the launches of ``PROFILED`` within a step, with Nsight Compute recording those alone."""
    import torch

    from resnet_fused import backend
    from resnet_fused.kernels.launch import Launch, observe_launches
    from tools.kernel_times import make_step

    with backend("triton"):
        step = make_step(ARCH, BATCH, 224, DTYPE, torch.device("cuda"))
        step()
        step()  # gradients are there
        launches: list[tuple[str, int]] = []
        with observe_launches(lambda launch: launches.append((launch.name, launch.flops))):
            step()
        wanted = set(most_operations(launches).values())
        index = -1

        def profile_launch(launch: Launch) -> None:
            nonlocal index
            index += 1
            if index in wanted:
                torch.cuda.synchronize()
                megabytes = f"{launch.bytes / 1e6:.1f} MB"
                print(f"{launch.name} {launch.config} grid {launch.grid} {megabytes}", flush=True)
                torch.cuda.profiler.start()
                launch.run()
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()

        with observe_launches(profile_launch):
            step()
        torch.cuda.synchronize()
    return 0


def most_operations(launches: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Of each kernel of ``PROFILED`` the index of the first launch with the most operations."""
    best: dict[str, tuple[int, int]] = {}
    for index, (name, flops) in enumerate(launches):
        if name in PROFILED and flops > best.get(name, (0, -1))[1]:
            best[name] = index, flops
    return {name: index for name, (index, _) in best.items()}


def profile(logs: Path) -> int:
    """Nsight Compute's report of six launches, its text, and per kernel compute and memory throughput in per cent."""
    ncu = find_tool("ncu")
    if ncu is None:
        print("ncu is not installed")
        return 1
    report = logs / "profile.ncu-rep"
    # The clocks stay as they are: they are the machine's, not ours.
    command = [ncu, "--profile-from-start", "off", "--clock-control", "none", "--force-overwrite"]
    command += [word for section in SECTIONS for word in ("--section", section)]
    command += [
        "--export",
        str(report),
        sys.executable,
        "-m",
        "benchmarks.gpu_stages",
        "launch_profiled",
        str(logs),
    ]
    status = subprocess.run(command, check=False).returncode
    if not report.exists():
        print(f"ncu wrote no report, exit status {status}")
        return 1
    shown = [ncu, "--import", str(report), "--page", "details"]
    text, table = (
        subprocess.run([*shown, *more], capture_output=True, text=True).stdout for more in ([], ["--csv"])
    )
    print(text)
    found = throughputs(table)
    print("; ".join(f"{name} {figures}" for name, figures in found) or "ncu measured nothing")
    return int(status != 0 or len(found) < len(PROFILED))


def throughputs(table: str) -> list[tuple[str, str]]:
    """Kernel, and compute and memory throughput in per cent of the peak, of a page of details as CSV."""
    names = {"Compute (SM) Throughput": "sm", "Memory Throughput": "memory"}
    rows: dict[tuple[str, str], dict[str, str]] = {}
    lines = [line for line in table.splitlines() if line.startswith('"')]
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        if row.get("Metric Name") in names and row.get("Metric Unit") == "%":
            kernel = row["ID"], row["Kernel Name"].partition("(")[0].strip().removesuffix("_kernel")
            rows.setdefault(kernel, {})[names[row["Metric Name"]]] = row["Metric Value"]
    return [
        (name, f"sm {found.get('sm', '?')} % memory {found.get('memory', '?')} %")
        for (_, name), found in rows.items()
    ]


def sanitize(logs: Path) -> int:
    """Two blocks of Triton kernels under the memory checker."""
    tool = find_tool("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not installed")
        return 1
    blocks = [sys.executable, "-m", "tests.gpu_small", "triton", *SANITIZED]
    # Without the tool first: what Triton compiles now, the tool's run finds in its cache.
    if status := subprocess.run(blocks).returncode:
        print(f"the blocks fail without the checker already, exit status {status}")
        return status
    checker = [tool, "--tool", "memcheck", "--print-limit", "20", "--error-exitcode", "1"]
    variables = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run([*checker, *blocks], env=variables).returncode


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit, which is not always on PATH."""
    paths = [f"/usr/local/cuda/bin/{name}", *sorted(glob(f"/opt/nvidia/nsight-compute/*/{name}"))]
    return shutil.which(name) or next((path for path in paths if os.access(path, os.X_OK)), None)


STAGES: Mapping[str, Callable[[Path], int]] = {
    stage.__name__: stage for stage in (environment, load, tune, profile, sanitize, launch_profiled)
}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.gpu_stages", description=__doc__)
    found.add_argument("stage", choices=STAGES)
    found.add_argument("folder", type=Path, help="where the stage writes")
    return found


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    try:
        return STAGES[options.stage](options.folder)
    except KeyboardInterrupt:
        return 130  # without a traceback: the last line says how far it came


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
