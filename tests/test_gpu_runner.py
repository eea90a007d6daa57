"""benchmarks.gpu where there is no GPU: deadlines, signals, failures and what is left in the folder of results."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_bundle, gpu_stages
from benchmarks.gpu import STAGES, Stage
from benchmarks.roofline import Ceilings, read_ceilings
from resnet_fused.backend import why_not_native
from resnet_fused.cli.main import make_parser
from resnet_fused.kernels.launch import Config, Launch
from tests.ops.test_residual_block import BLOCKS

ROOT = Path(__file__).parents[1]
#: A module that does what its first argument says.
TOY = """
import pathlib, subprocess, sys, time
print("begun", flush=True)
match sys.argv[1]:
    case "sleep":
        time.sleep(60)
    case "child":
        print(subprocess.Popen(["sleep", "60"]).pid)
    case "fail":
        sys.exit("a failure")
    case "write":
        pathlib.Path(sys.argv[2]).write_text("result")
print("done")
"""
Run = Callable[..., tuple[int, list[list[str]]]]


def toy(name: str, seconds: int, *what: str, least: int = 1) -> Stage:
    return Stage("first", name, seconds, least, tuple(f"toy {each}" for each in what))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs stages of toys; the exit status, and the words of each line of the summary."""
    (tmp_path / "toy.py").write_text(TOY)
    for name, value in (("ROOT", tmp_path), ("GRACE", 2.0), ("has_gpu", lambda: True)):
        monkeypatch.setattr(gpu, name, value)

    def run(*stages: Stage, seconds: float = 60) -> tuple[int, list[list[str]]]:
        monkeypatch.setattr(gpu, "STAGES", stages)
        status = gpu.main([str(tmp_path / "out"), "--seconds", str(seconds)])
        return status, [line.split() for line in (tmp_path / "out" / "summary.txt").read_text().splitlines()]

    return run


def logs_of(out: Path) -> dict[str, str]:
    """The archive's files."""
    with tarfile.open(out / "logs.tar.gz") as tar:
        files = [(member.name, tar.extractfile(member)) for member in tar if member.isfile()]
        return {name.removeprefix("logs/"): file.read().decode() for name, file in files if file}


def test_stages_run_after_one_that_fails(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines = run(
        toy("bad", 9, "fail", "write {out}/found.json"), toy("good", 9, "write {logs}/more.json")
    )
    assert status == 1
    assert [line[:2] for line in lines] == [["bad", "failed"], ["good", "passed"]]
    assert "a failure; done" in " ".join(lines[0]) and capsys.readouterr().out.count("\n") == 2
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["found.json", "logs.tar.gz", "summary.txt"]
    logs = logs_of(out)
    assert sorted(logs) == ["bad.log", "good.log", "more.json"] and "$ " in logs["bad.log"]
    assert run(toy("good", 9, "nothing"))[0] == 0


def test_limits_and_the_deadline(run: Run, tmp_path: Path) -> None:
    status, lines = run(
        toy("limited", 1, "sleep", "fail"),
        toy("ended", 60, "sleep"),
        toy("late", 60, "nothing", least=30),
        seconds=5,
    )
    assert status == 1
    assert [line[:2] for line in lines] == [["limited", "timeout"], ["ended", "timeout"], ["late", "skipped"]]
    assert all(float(line[2]) < 30 for line in lines) and " ".join(lines[2]).endswith("it needs 30")
    assert "KeyboardInterrupt" in logs_of(tmp_path / "out")["limited.log"]


def test_processes_of_a_stage_are_ended(run: Run, tmp_path: Path) -> None:
    assert run(toy("family", 20, "child"))[0] == 0
    process = Path("/proc", logs_of(tmp_path / "out")["family.log"].split()[-2])
    for _ in range(100):  # until it is gone, or a zombie that nobody waits for here
        if not process.exists() or process.joinpath("stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child of a stage still runs")


def test_a_signal_leaves_results_and_logs(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    out = tmp_path / "out"
    code = f"""
from pathlib import Path
from benchmarks import gpu
gpu.ROOT, gpu.has_gpu, gpu.GRACE = Path({str(tmp_path)!r}), lambda: True, 2.0
toys = (("result", "write {{out}}/found.json"), ("slow", "sleep"), ("never", "nothing"))
gpu.STAGES = tuple(gpu.Stage("first", name, 60, 1, (f"toy {{what}}",)) for name, what in toys)
raise SystemExit(gpu.main([{str(out)!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        current = out / "current.log"
        while process.poll() is None and not ((out / "logs.tar.gz").exists() and current.exists()):
            time.sleep(0.1)
        while process.poll() is None and "begun" not in current.read_text():
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    lines = [line.split() for line in (out / "summary.txt").read_text().splitlines()]
    assert [line[:2] for line in lines] == [["result", "passed"], ["slow", "stopped"]]
    assert sorted(path.name for path in out.iterdir()) == ["found.json", "logs.tar.gz", "summary.txt"]
    assert "begun" in logs_of(out)["slow.log"] and "result.log" in logs_of(out)


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([str(tmp_path / "out"), "first", "second", "third", "--dry-run"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines] == [[stage.name, "passed"] for stage in STAGES]
    logs = logs_of(tmp_path / "out")
    assert all(logs[f"{s.name}.log"].count("would run -m") == len(s.commands) for s in STAGES)
    assert str(tmp_path / "out" / "record.json") in logs["record.log"]
    assert "RESNET_FUSED_BACKEND" in logs["tests.log"] and "'captured or graphed'" in logs["capture.log"]
    assert gpu.main([str(tmp_path / "one"), "kernels", "--dry-run"]) == 0
    assert list(logs_of(tmp_path / "one")) == ["kernels.log"]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_commands_are_understood(stage: Stage) -> None:
    for _, (module, *arguments) in stage.runs(out=Path("out"), logs=Path("logs")):
        if module.startswith(("benchmarks.", "tools.")):
            importlib.import_module(module).parser().parse_args(arguments)
        elif module == "pytest":
            assert all((ROOT / word).exists() for word in arguments if word.startswith("tests/"))
        else:
            assert module == "resnet_fused" and make_parser().parse_args(arguments)


def test_plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "BUNDLE", ROOT / "setup.py")
    assert gpu.main(["--plan"]) == 0
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(words) == len(STAGES) + 3
    sums = {name: int(seconds) for name, seconds, _ in words if name in ("first", "second", "third")}
    assert sum(sums.values()) == sum(stage.seconds for stage in STAGES)
    assert sums["first"] <= gpu.SECONDS and sums["second"] <= 180
    monkeypatch.setattr(gpu, "BUNDLE", ROOT / "nothing.tar.xz")
    assert gpu.main(["--plan"]) == 0
    shown = capsys.readouterr().out
    assert f"load        {gpu.BUILD_SECONDS} s" in shown and "make gpu-bundle" in shown


def test_misuse(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for arguments, message in (
        (["out", "kernels", "nonsense"], "unknown stage nonsense: choose some of environment, load"),
        ([], "OUT is missing"),
    ):
        with pytest.raises(SystemExit, match="2"):
            gpu.main(arguments)
        assert message in capsys.readouterr().err
    monkeypatch.setattr(gpu, "has_gpu", lambda: False)
    assert gpu.main([str(tmp_path / "out")]) == 3 and "no NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Stages


def test_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.roofline.measure", lambda dtype, device: Ceilings(2e12, 1e14))
    monkeypatch.setattr("benchmarks.roofline.fastest_seconds", lambda run, device: run() is None or 1e-12)
    monkeypatch.setattr(gpu_stages, "SIZE", 8)
    assert gpu_stages.environment(tmp_path, "cpu") == 0
    assert read_ceilings(tmp_path / "environment.json", "bf16") == Ceilings(2e12, 2 * 8**3 / 1e-12)
    assert "copy 2.00 TB/s, bf16 matmul 1024 TFLOP/s" in capsys.readouterr().out.splitlines()[-1]


def test_load(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cache, extension, built = tmp_path / "cache", tmp_path / "_C.so", tmp_path / "built.so"
    (cache / "A").mkdir(parents=True)
    (cache / "A" / "conv.cubin").write_bytes(b"")
    extension.write_bytes(b"from the bundle")
    built.write_bytes(b"compiled here")
    bundle, installed = tmp_path / "bundle.tar.xz", tmp_path / "resnet_fused" / "_C.abi3.so"
    gpu_bundle.pack(bundle, cache, ["A"], {gpu_bundle.EXTENSION: extension}, {})
    for name, value in (("BUNDLE", bundle), ("ROOT", tmp_path)):
        monkeypatch.setattr(gpu_stages, name, value)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "found"))
    monkeypatch.setattr(gpu_bundle, "differences", lambda manifest: ["ptxas differs"])
    monkeypatch.setattr(gpu_bundle, "build_extension", lambda folder: built)
    answers = [(0, ""), (1, "no libcudart"), (1, "still none")]
    monkeypatch.setattr(gpu_stages, "_info", lambda: answers.pop(0))
    assert gpu_stages.main(["load", str(tmp_path)]) == 0 and installed.read_bytes() == extension.read_bytes()
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "1 kernels, 0 launchers; ptxas differs; extension loads, with CUDA"
    assert gpu_stages.main(["load", str(tmp_path)]) == 1 and installed.read_bytes() == built.read_bytes()
    assert capsys.readouterr().out.endswith("extension compiled here; still none\n")


def test_why_the_package_does_not_load() -> None:
    why = why_not_native("cuda")
    assert gpu_stages._info() == (int(why is not None), why or "")


def test_the_launches_that_are_profiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[tuple[str, int, bool]] = []
    profiling = [False]

    def step() -> None:
        for name, flops in (("conv_bn_stats", 1), ("sum", 9), ("conv_bn_stats", 2), ("dgrad", 3)):
            Launch(
                SimpleNamespace(__name__=f"{name}_kernel"), (1,), {"x": x}, {}, Config(), flops=flops
            ).start()

    x = torch.empty(1, device="meta")
    monkeypatch.setattr(Launch, "run", lambda self: ran.append((self.name, self.flops, profiling[-1])))
    monkeypatch.setattr("tools.kernel_times.make_step", lambda *_: step)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("torch.cuda.profiler.start", lambda: profiling.append(True))
    monkeypatch.setattr("torch.cuda.profiler.stop", lambda: profiling.append(False))
    assert gpu_stages.main(["launch_profiled", str(tmp_path)]) == 0
    assert ran == [("conv_bn_stats", 2, True), ("dgrad", 3, True)]
    assert gpu_stages.most_operations([("conv_bn_stats", 7), ("conv_bn_stats", 7), ("sum", 9)]) == {
        "conv_bn_stats": 0
    }


def test_what_nsight_compute_reports() -> None:
    table = """==PROF== Connected
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","conv_kernel (1, 2)x(3)","GPU Speed Of Light Throughput","Memory Throughput","%","61.20"
"0","7","conv_kernel (1, 2)x(3)","GPU Speed Of Light Throughput","Compute (SM) Throughput","%","40.10"
"0","7","conv_kernel (1, 2)x(3)","Memory Workload Analysis","Memory Throughput","Tbyte/s","1.90"
"1","7","dgrad_kernel","GPU Speed Of Light Throughput","Memory Throughput","%","33.00"
"""
    assert gpu_stages.throughputs(table) == [
        ("conv", "sm 40.10 % memory 61.20 %"),
        ("dgrad", "sm ? % memory 33.00 %"),
    ]
    assert gpu_stages.throughputs("no kernels were profiled") == []


def test_a_missing_tool_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(gpu_stages.SANITIZED) <= set(BLOCKS)
    monkeypatch.setattr(gpu_stages, "find_tool", lambda name: None)
    for name, tool in (("profile", "ncu"), ("sanitize", "compute-sanitizer")):
        assert gpu_stages.main([name, str(tmp_path)]) == 1
        assert capsys.readouterr().out == f"{tool} is not installed\n"


def test_hits_of_the_cache_are_counted() -> None:
    knobs = pytest.importorskip("triton").knobs
    ours, theirs = (SimpleNamespace(fn=SimpleNamespace(module=m)) for m in ("resnet_fused.kernels.conv", "x"))
    with gpu_stages.compilations() as said:
        for source, hit in ((ours, True), (ours, False), (theirs, False)):
            knobs.compilation.listener(src=source, cache_hit=hit, times=SimpleNamespace(total=2_000_000))
        assert said() == "cache hits 1 of 2, 2 s compiling"
    assert knobs.compilation.listener is None


def test_an_interrupted_search_leaves_its_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    search = "resnet_fused.kernels.autotune.search"
    monkeypatch.setattr(f"{search}.write_table", lambda path: path.write_text("{}"))
    monkeypatch.setattr(f"{search}.entries", list)
    monkeypatch.setattr(f"{search}.summary", lambda: {"tuning keys": 3})

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tools.kernel_times.make_step", lambda *_: interrupted)
    assert gpu_stages.main(["tune", str(tmp_path)]) == 130
    assert os.listdir(tmp_path) == ["tuned.json"]
    assert "tuning keys 3; cache hits 0 of 0" in capsys.readouterr().out
