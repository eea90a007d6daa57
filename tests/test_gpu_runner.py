"""benchmarks.gpu where there is no GPU: limits, signals, failures and what is left in the folder of results."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import gpu
from tests.ops.test_residual_block import BLOCKS

ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, list[list[str]]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs stages; the exit status, and the words of each line of the output."""
    monkeypatch.setattr(gpu, "GRACE", 2.0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)

    def run(stages: dict[str, tuple[int, str]], *arguments: str) -> tuple[int, list[list[str]]]:
        monkeypatch.setattr(gpu, "STAGES", stages)
        status = gpu.main([str(tmp_path), *arguments])
        return status, [line.split() for line in capsys.readouterr().out.splitlines()]

    return run


def test_stages_run_after_one_that_fails(run: Run, tmp_path: Path) -> None:
    stages = {"bad": (9, "echo begun; echo a failure >&2; exit 3"), "good": (9, "echo 1 > $OUT/result; pwd")}
    status, lines = run(stages)
    assert status == 1
    assert [line[:2] for line in lines] == [["bad", "failed"], ["good", "passed"]]
    assert lines[0][-2:] == ["a", "failure"] and lines[1][-1] == str(ROOT)
    assert (tmp_path / "bad.log").read_text() == "begun\na failure\n"
    assert (tmp_path / "result").read_text() == "1\n"
    status, lines = run(stages, "good")
    assert status == 0 and len(lines) == 1


def test_limits_and_the_deadline(run: Run, tmp_path: Path) -> None:
    limited = "trap 'echo interrupted; exit 1' INT; sleep 60"
    stages = {"limited": (2, limited), "ended": (10, "echo begun; sleep 60"), "late": (60, "echo never")}
    status, lines = run(stages, "--seconds", "10")
    assert status == 1
    assert [line[:2] for line in lines] == [["limited", "timeout"], ["ended", "timeout"], ["late", "skipped"]]
    assert all(float(line[2]) < 30 for line in lines)
    assert (tmp_path / "limited.log").read_text() == "interrupted\n"


def test_processes_of_a_stage_are_ended(run: Run, tmp_path: Path) -> None:
    assert run({"family": (20, "sleep 60 & echo $!")})[0] == 0
    process = Path("/proc", (tmp_path / "family.log").read_text().strip())
    for _ in range(100):  # until it is gone, or a zombie that nobody waits for here
        if not process.exists() or process.joinpath("stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child of a stage still runs")


def test_a_signal_ends_the_stage_and_leaves_results(tmp_path: Path) -> None:
    code = f"""
import torch
from benchmarks import gpu
torch.cuda.is_available = lambda: True
gpu.STAGES = {{"slow": (60, "echo begun; sleep 60; echo done"), "never": (60, "echo never")}}
raise SystemExit(gpu.main([{str(tmp_path)!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        log = tmp_path / "slow.log"
        while process.poll() is None and not (log.exists() and log.read_text()):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert log.read_text() == "begun\n" and not (tmp_path / "never.log").exists()


def test_commands() -> None:
    """Shell syntax, and that programs, their options and files are there."""
    commands = "\n".join(command for _, command in gpu.STAGES.values())
    subprocess.run(["bash", "-n", "-c", commands], check=True)
    for module in {*re.findall(r"PYTHON -m ((?:benchmarks|tools|resnet_fused)\S*)", commands)}:
        command = [sys.executable, "-m", module, "--help"]
        text = subprocess.check_output(command, cwd=ROOT, text=True)
        given = {
            option for line in re.findall(rf"-m {module} ([^;&|}}\n]*)", commands) for option in line.split()
        }
        assert all(option in text for option in given if option.startswith("--")), (module, given)
    assert all((ROOT / path).exists() for path in re.findall(r"(?:tests|benchmarks)/\S+", commands))
    assert {"bottleneck_downsample", "basic_block"} <= {*BLOCKS}


def test_misuse(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for arguments, message in (
        (["out", "kernels", "nonsense"], "unknown stage nonsense: choose some of load, environment"),
        ([], "OUT"),
        ([str(tmp_path / "out")], "sees no CUDA GPU"),
    ):
        with pytest.raises(SystemExit, match="2"):
            gpu.main(arguments)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
