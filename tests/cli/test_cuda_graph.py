"""`--cuda-graph`: where it is used, what it says where it cannot be, and that a run stays the run that it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import resnet_fused
from resnet_fused.cli import learner
from resnet_fused.cli import train as training
from resnet_fused.cli.distributed import World
from resnet_fused.cli.learner import why_no_cuda_graph
from tests.cli.conftest import Cli, assert_same_run, load
from tests.graphed_steps import StepOnCPU

REASON = "resnet_fused: trains without --cuda-graph: it needs a CUDA GPU, and this run is on cpu\n"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[StepOnCPU]:
    """The captured steps of all learners, with a stand-in for the graph."""
    captured: list[StepOnCPU] = []

    def make(*arguments: Any, **options: Any) -> StepOnCPU:
        captured.append(StepOnCPU(*arguments, **options))
        return captured[-1]

    monkeypatch.setattr(learner, "GraphedStep", make)
    for module in (learner, training):
        monkeypatch.setattr(module, "why_no_cuda_graph", lambda device, world: None)
    return captured


def test_a_cpu_trains_without(train: Cli, tmp_path: Path) -> None:
    assert train("--max-steps", 3, out="plain").code == 0
    result = train("--cuda-graph", "--max-steps", 2)
    assert result.code == 0 and REASON in result.err
    assert "CUDA graph" not in result.out
    assert REASON in train("--resume", "--max-steps", 3).err  # the checkpoint remembers what was asked for
    assert_same_run(tmp_path / "plain" / "last.pt", tmp_path / "out" / "last.pt")


def test_where_it_can_be() -> None:
    gpu = torch.device("cuda", 0)
    assert why_no_cuda_graph(gpu, World()) is None
    assert "2 processes" in (why_no_cuda_graph(gpu, World(size=2)) or "")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_trains_as_without(precision: str, train: Cli, steps: list[StepOnCPU], tmp_path: Path) -> None:
    few = ("--precision", precision, "--max-steps", 5)
    assert train(*few, out="plain").code == 0
    assert not steps
    result = train(*few, "--cuda-graph")
    assert result.code == 0 and "CUDA graph" in result.out and "without" not in result.err
    assert [step.captures for step in steps] == [1]
    plain, captured = (load(tmp_path / out / "last.pt") for out in ("plain", "out"))
    # Fused, SGD rounds elsewhere; a few steps later float16 has made more of it.
    limit = 1e-4 if precision == "fp32" else 0.1
    losses = [state["progress"]["losses"] for state in (captured, plain)]
    torch.testing.assert_close(*losses, rtol=limit, atol=limit)
    for group in captured["optimizer"]["param_groups"]:
        assert type(group["lr"]) is float
    rates = [state["progress"]["history"][-1]["learning_rate"] for state in (captured, plain)]
    assert rates[0] == rates[1]
    assert bool(captured["scaler"]) == (precision == "fp16")


def test_resumed_equals_uninterrupted(train: Cli, steps: list[StepOnCPU], tmp_path: Path) -> None:
    """Stopped after a capture, and captured again."""
    assert train("--cuda-graph", out="whole").code == 0
    assert train("--cuda-graph", "--max-steps", 4).code == 0
    assert train("--resume").code == 0
    assert [step.captures for step in steps] == [1, 1, 1]
    assert_same_run(tmp_path / "whole" / "last.pt", tmp_path / "out" / "last.pt")


def test_goes_on_without(train: Cli, steps: list[StepOnCPU], tmp_path: Path) -> None:
    """And with it again: a checkpoint's optimizer may be fused or not, and it remembers what was asked for."""
    for number, (option, fused) in enumerate(
        [("--cuda-graph", True), ("--no-cuda-graph", None), ("--cuda-graph", True)], start=1
    ):
        resume = ["--resume"] if number > 1 else []
        assert train(option, *resume, "--max-steps", number).code == 0
        state = load(tmp_path / "out" / "last.pt")
        assert [group["fused"] for group in state["optimizer"]["param_groups"]] == [fused, fused]
        assert state["settings"]["cuda_graph"] == (option == "--cuda-graph")
    assert len(steps) == 2


def test_compared_with_each_other(train: Cli, steps: list[StepOnCPU]) -> None:
    result = train("--impl", "compare", "--cuda-graph", "--max-steps", 4)
    assert result.code == 0, result.err
    assert "held-out accuracy" in result.out
    assert [step.captures for step in steps] == [1, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gpu(precision: str, cli: Cli, images: Path, tmp_path: Path) -> None:
    """A captured run is the same, whole or resumed, and close to one that launches its kernels one by one."""
    common = ("--data", images, "--image-size", 64, "--batch-size", 4, "--epochs", 3, "--workers", 1)

    def run(out: str, *arguments: object) -> torch.Tensor:
        with resnet_fused.backend("triton"):
            result = cli("train", *common, "--precision", precision, "--out", tmp_path / out, *arguments)
        assert result.code == 0, result.err
        assert "without --cuda-graph" not in result.err
        losses: torch.Tensor = load(tmp_path / out / "last.pt")["progress"]["losses"]
        return losses

    plain, captured = run("plain"), run("whole", "--cuda-graph")
    torch.testing.assert_close(captured, plain, rtol=0.1, atol=0.1)
    run("out", "--cuda-graph", "--max-steps", 6)
    run("out", "--resume")
    assert_same_run(tmp_path / "whole" / "last.pt", tmp_path / "out" / "last.pt")


@pytest.mark.gpu
def test_gpu_compared(cli: Cli, images: Path, tmp_path: Path) -> None:
    small = ("--image-size", 64, "--batch-size", 4, "--epochs", 3, "--workers", 0, "--precision", "bf16")
    with resnet_fused.backend("triton"):
        result = cli(
            "train", "--impl", "compare", "--cuda-graph", "--data", images, *small, "--out", tmp_path / "out"
        )
    assert result.code == 0, result.err
    assert "peak memory of a step" in result.out
