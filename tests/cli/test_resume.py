"""An interrupted run that is resumed is the uninterrupted run, to the last bit."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor

from resnet_fused.cli.learner import Learner
from tests.cli.conftest import SMALL, Cli, assert_same_run, load


@pytest.mark.parametrize(
    ("impl", "stops"),
    [("fused", (1, 6)), ("fused", (4,)), ("reference", (3,))],
    ids=["twice in mid-epoch", "at the end of an epoch", "reference"],
)
def test_resumed_equals_uninterrupted(impl: str, stops: tuple[int, ...], train: Cli, tmp_path: Path) -> None:
    assert train("--impl", impl, out="whole").code == 0
    for place, stop in enumerate(stops):
        result = train("--impl", impl, "--max-steps", stop, *(["--resume"] if place else []))
        assert result.code == 0
        assert f"stopped at step {stop} of 8" in result.out
    assert train("--resume").code == 0
    assert_same_run(tmp_path / "whole" / "last.pt", tmp_path / "out" / "last.pt")
    assert_same_run(tmp_path / "whole" / "best.pt", tmp_path / "out" / "best.pt")


def test_workers_do_not_change_the_run(train: Cli, tmp_path: Path) -> None:
    assert train(out="none").code == 0
    assert train("--workers", 2, "--max-steps", 5).code == 0
    assert train("--workers", 1, "--resume").code == 0
    assert_same_run(tmp_path / "none" / "last.pt", tmp_path / "out" / "last.pt")


def test_seed_changes_the_run(train: Cli, tmp_path: Path) -> None:
    for seed in (0, 1):
        assert train("--seed", seed, "--max-steps", 1, out=str(seed)).code == 0
    assert (
        load(tmp_path / "0" / "last.pt")["progress"]["losses"]
        != load(tmp_path / "1" / "last.pt")["progress"]["losses"]
    )


@pytest.mark.parametrize(
    ("signum", "code", "impl"), [(signal.SIGINT, 130, "fused"), (signal.SIGTERM, 143, "compare")]
)
def test_signal_saves(
    signum: signal.Signals, code: int, impl: str, train: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Learner.step

    def step(self: Learner, images: Tensor, labels: Tensor) -> None:
        if (self.progress.epoch, self.progress.step) == (1, 1):
            os.kill(os.getpid(), signum)
        whole(self, images, labels)

    before = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", step)
        result = train("--impl", impl)
    assert result.code == code
    assert "stopped at step 6 of 8" in result.out
    assert signal.getsignal(signum) is before
    command = next(line for line in result.out.splitlines() if "--resume" in line).strip()
    assert command == f"python -m resnet_fused train --out {shlex.quote(str(tmp_path / 'out'))} --resume"
    assert train("--resume").code == 0
    assert train("--impl", impl, out="whole").code == 0
    for part in ("fused", "reference") if impl == "compare" else ("",):
        assert_same_run(tmp_path / "whole" / part / "last.pt", tmp_path / "out" / part / "last.pt")


def test_signal_during_the_evaluation(train: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Learner.evaluate

    def evaluate(self: Learner, batches: object) -> tuple[float, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, batches)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "evaluate", evaluate)
        assert train().code == 143
    assert load(tmp_path / "out" / "last.pt")["progress"]["step"] == 4
    assert train("--resume").code == 0
    assert train(out="whole").code == 0
    assert_same_run(tmp_path / "whole" / "last.pt", tmp_path / "out" / "last.pt")


def test_sigterm_to_a_process_with_workers(images: Path, tmp_path: Path) -> None:
    """The whole process group gets the signal, as from a terminal or torchrun; the printed command goes on."""
    out = tmp_path / "out"
    small = [*SMALL, "--epochs", "9999", "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "resnet_fused", "train", "--data", images, *small, "--out", out],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        while not process.stdout.readline().startswith("epoch 1/"):
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGTERM)
        printed, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    progress = load(out / "last.pt")["progress"]
    done = 4 * progress["epoch"] + progress["step"]
    assert len(progress["losses"]) == done > 0
    command = next(line for line in printed.splitlines() if "--resume" in line).split()
    command[0] = sys.executable
    subprocess.run([*command, "--max-steps", str(done + 1)], check=True, capture_output=True, timeout=60)
    assert len(load(out / "last.pt")["progress"]["losses"]) == done + 1


def test_resume_into_another_folder_takes_the_best_along(train: Cli, tmp_path: Path) -> None:
    assert train("--max-steps", 5).code == 0
    assert train("--resume", tmp_path / "out" / "last.pt", out="new").code == 0
    assert (
        load(tmp_path / "new" / "best.pt")["progress"]["best"]
        == load(tmp_path / "new" / "last.pt")["progress"]["best"]
    )
    assert load(tmp_path / "out" / "last.pt")["progress"]["step"] == 1


def test_the_other_implementation_goes_on(train: Cli, tmp_path: Path) -> None:
    assert train("--impl", "reference", "--max-steps", 3).code == 0
    assert train("--impl", "fused", "--resume").code == 0
    assert load(tmp_path / "out" / "last.pt")["settings"]["impl"] == "fused"
