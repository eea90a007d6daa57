"""SIGKILL at any moment, then the same command again: the run ends as if nothing had been."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.conftest import KILLS, MANY, SMALL, Cli, assert_same_run, load, only_many
from tests.cli.processes import Process, Server, start_server
from tests.cli.test_bad_input import assert_refused

EPOCHS = 3 if MANY else 2
DIGITS = ["--data", "digits", "--image-size", 16, "--batch-size", 300, "--workers", 0, "--device", "cpu"]
FILES = [".lock", "best.pt", "config.json", "curves.png", "last.pt", "metrics.jsonl"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with start_server() as server:
        yield server


@dataclass(frozen=True)
class Whole:
    """A run that nothing interrupts.

    Attributes:
        options: all but its folder.
        out: its folder.
        seconds: that it takes.
    """

    options: list[object]
    out: Path
    seconds: float

    @property
    def replacements(self) -> int:
        """Files that are renamed into place: config.json, in each epoch last.pt, best.pt where it is better, and
        metrics.jsonl, and at the end curves.png."""
        accuracies = [record["val_accuracy"] for record in load(self.out / "last.pt")["progress"]["history"]]
        better = sum(accuracy > max([-1.0, *accuracies[:epoch]]) for epoch, accuracy in enumerate(accuracies))
        return 1 + 2 * EPOCHS + better + 1

    def start(self, server: Server, out: Path, **kill: int) -> Process:
        """The same run into another folder, or the rest of it."""
        return server.start([*self.options, "--out", out], out.with_suffix(".txt"), **kill)


@pytest.fixture(scope="module")
def whole(server: Server, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    out = tmp_path_factory.mktemp("whole") / "out"
    data = DIGITS if MANY else ["--data", images, *SMALL]
    options = ["train", *data, "--epochs", EPOCHS, "--resume", "auto"]
    began = time.monotonic()
    with Whole(options, out, 0).start(server, out) as process:
        assert process.wait() == 0
    return Whole(options, out, time.monotonic() - began)


def assert_same_folder(whole: Path, out: Path) -> None:
    assert sorted(os.listdir(out)) == FILES
    for name in ("last.pt", "best.pt"):
        assert_same_run(whole / name, out / name)
    metrics = [(folder / "metrics.jsonl").read_text().count("\n") for folder in (whole, out)]
    assert metrics[0] == metrics[1] == EPOCHS
    assert (out / "config.json").read_text() == (whole / "config.json").read_text()


@pytest.mark.timeout(3600)
def test_kills_at_random_moments(server: Server, whole: Whole, tmp_path: Path) -> None:
    """SIGKILL at random moments of a run, resumed each time until it ends."""
    draw = random.Random(int(os.environ["RESNET_FUSED_TEST_SEED"]))
    kills, attempt = 0, 0
    while True:
        out = tmp_path / str(attempt)
        with whole.start(server, out) as process:
            if kills < KILLS:
                time.sleep(draw.uniform(0, whole.seconds / 2))
                process.kill()
            code = process.wait()
        if code:
            assert code == -signal.SIGKILL, process.output.read_text()
            kills += 1
            continue
        assert_same_folder(whole.out, out)
        attempt += 1
        if kills == KILLS:
            return


#: The first of these moments is between the first last.pt and its best.pt, the last one before curves.png.
MOMENTS = [(2, True), *((replacement, False) for replacement in ((*range(1, 9), -1) if MANY else ()))]


@pytest.mark.parametrize(("replacement", "after"), MOMENTS)
def test_kills_between_writes(
    server: Server, whole: Whole, tmp_path: Path, replacement: int, after: bool
) -> None:
    """SIGKILL before or after a file is renamed into place, then resumed."""
    out = tmp_path / "out"
    replacements = whole.replacements if replacement == -1 else replacement
    with whole.start(server, out, replacements=replacements, after=after) as process:
        assert process.wait() == -signal.SIGKILL
    with whole.start(server, out) as process:
        assert process.wait() == 0
    assert_same_folder(whole.out, out)


def test_two_runs_into_one_folder(server: Server, train: Cli, images: Path, tmp_path: Path) -> None:
    """A second run into the folder of one that lives, and at once after that was killed."""
    out = tmp_path / "out"
    arguments = ["train", "--data", images, *SMALL, "--epochs", 9999, "--out", out]
    with server.start(arguments, tmp_path / "output") as first:
        while not (out / "metrics.jsonl").exists():
            time.sleep(0.05)
        config = (out / "config.json").read_bytes()
        for options in ((), ("--resume",), ("--overwrite",), ("--overwrite", "--impl", "compare")):
            assert_refused(train(*options), f"process {first.pid} on ", str(out), "choose another --out")
        assert (out / "config.json").read_bytes() == config
        assert first.kill() == -signal.SIGKILL
    done = load(out / "last.pt")["progress"]["epoch"]
    assert train("--resume", "--epochs", done + 1).code == 0
    assert not [name for name in os.listdir(out) if name.endswith(".tmp")]


@only_many
def test_two_runs_where_one_compares(server: Server, train: Cli, images: Path, tmp_path: Path) -> None:
    """A run that goes on with one of two models, in the folder of a comparison that lives."""
    out = tmp_path / "out"
    arguments = ["train", "--data", images, *SMALL, "--epochs", 9999, "--out", out, "--impl", "compare"]
    with server.start(arguments, tmp_path / "output") as first:
        while not (out / "reference" / "metrics.jsonl").exists():
            time.sleep(0.05)
        for folder in (out, out / "fused"):
            result = train("--resume", folder, "--impl", "fused", "--out", out / "fused")
            assert_refused(result, f"process {first.pid} on ", str(out / "fused"))
