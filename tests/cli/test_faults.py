"""Errors in mid-epoch, full and read-only disks, files and folders that vanish: a clear end, and nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import nn

from resnet_fused.cli import run_folder
from resnet_fused.cli.learner import Learner
from tests.cli.conftest import MANY, Cli, assert_same_run, load, make_images, only_many
from tests.cli.test_bad_input import assert_refused

STEPS = 4  # in an epoch


def at_step(
    patch: pytest.MonkeyPatch, done: tuple[int, int], fail: Callable[[Learner], None], name: str = "step"
) -> None:
    """Calls `fail` before that method of a learner that has done so many epochs and steps."""
    whole = getattr(Learner, name)

    def step(self: Learner, *arguments: object, **more: object) -> object:
        if (self.progress.epoch, self.progress.step) == done:
            fail(self)
        return whole(self, *arguments, **more)

    patch.setattr(Learner, name, step)


def assert_goes_on(train: Cli, tmp_path: Path, whole: Path) -> None:
    """The run in `out`, resumed, ends as the one in `whole`, that nothing has interrupted."""
    assert train("--resume").code == 0
    assert not [*(tmp_path / "out").rglob("*.tmp")]
    checkpoints = [*whole.rglob("*.pt")]
    assert checkpoints
    for path in checkpoints:
        assert_same_run(path, tmp_path / "out" / path.relative_to(whole))


@pytest.fixture(scope="session")
def _whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole") / "out"


@pytest.fixture
def whole(train: Cli, _whole: Path) -> Path:
    """The run of `train` without more options, once; not to be changed."""
    if not _whole.exists():
        assert train(out=str(_whole)).code == 0
    return _whole


@pytest.mark.parametrize("workers", [0, 1] if MANY else [1])
def test_image_that_vanishes(workers: int, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that vanishes in mid-epoch, and comes back."""
    data = make_images(tmp_path / "data")
    image = data / "train" / "dark" / "3.png"

    def train(*options: object, out: str = "out") -> object:
        small = ("--image-size", 16, "--batch-size", 2, "--epochs", 1, "--workers", workers)
        return cli("train", "--data", data, *small, "--out", tmp_path / out, *options)

    with monkeypatch.context() as patch:
        at_step(patch, (0, 1), lambda _: image.rename(tmp_path / "elsewhere") and None)
        result = train()
    assert_refused(result, str(image), "No such file", "replace or remove")
    step = load(tmp_path / "out" / "last.pt")["progress"]["step"]
    assert step > 0 and f"stopped at step {step} of 9; to go on:\n  python" in result.out
    (tmp_path / "elsewhere").rename(image)
    assert train(out="whole").code == 0
    assert_goes_on(train, tmp_path, tmp_path / "whole")


class InTheStep(Exception):
    """Something that nobody has foreseen."""


def fail(*_: object, **__: object) -> None:
    raise InTheStep("in the middle of a step")


IN_A_STEP: dict[str, tuple[object, ...]] = {
    "accumulate": ("--accumulate", 2),
    "plain": (),
    "ema": ("--ema", 0.5, "--optimizer", "adamw"),
    "compare": ("--impl", "compare"),
}


@pytest.mark.parametrize("kind", IN_A_STEP if MANY else ["accumulate"])
def test_error_in_a_step(kind: str, train: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error after the forward pass has changed running statistics: the last step is saved."""
    with monkeypatch.context() as patch:
        # With --accumulate in the second of two batches, and the checkpoint is of before the first.
        at_step(patch, (1, 2 + (kind == "accumulate")), lambda self: setattr(self, "criterion", fail))
        with pytest.raises(InTheStep):
            train(*IN_A_STEP[kind])
    for path in (tmp_path / "out").rglob("last.pt"):
        assert load(path)["progress"]["step"] == 2
    assert train(*IN_A_STEP[kind], out="whole").code == 0
    assert_goes_on(train, tmp_path, tmp_path / "whole")


def test_error_in_the_optimizer(train: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while the optimizer changes the weights: the last checkpoint stays."""
    with monkeypatch.context() as patch:
        at_step(patch, (1, 2), lambda self: patch.setattr(self.optimizer, "step", fail))
        with pytest.raises(InTheStep):
            train()
    progress = load(tmp_path / "out" / "last.pt")["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 0)


@only_many
def test_error_in_one_of_two_models(train: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in a step of one model when the other has done it: both keep the checkpoint of the same step."""
    with monkeypatch.context() as patch:
        second = "reference"
        at_step(patch, (1, 2), lambda self: self.name == second and setattr(self, "criterion", fail))
        with pytest.raises(InTheStep):
            train("--impl", "compare")
    assert [
        load(tmp_path / "out" / name / "last.pt")["progress"]["step"]
        for name in run_folder.LEARNERS["compare"]
    ] == [0, 0]


def test_error_in_the_evaluation(
    train: Cli, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error while held-out images are evaluated: the steps of the epoch are saved."""
    with monkeypatch.context() as patch:
        at_step(patch, (1, STEPS), fail, "evaluate")
        with pytest.raises(InTheStep):
            train()
    assert load(tmp_path / "out" / "last.pt")["progress"]["step"] == STEPS
    assert_goes_on(train, tmp_path, whole)


def test_weights_that_are_not_finite(train: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update that overflows in the last step of an epoch, after a loss that was finite."""

    def overflow(self: Learner) -> None:
        nn.init.constant_(self.model.get_parameter("fc.bias"), float("inf"))

    at_step(monkeypatch, (1, STEPS), overflow, "evaluate")
    assert_refused(train(), "fc.bias is not finite after step 8", "untouched", "--lr")
    assert load(tmp_path / "out" / "last.pt")["progress"]["epoch"] == 1


@pytest.mark.parametrize("ignored", [False, True], ids=["alone", "nohup"])
def test_hangup(ignored: bool, train: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGHUP in mid-epoch: the run is saved; under nohup it trains on."""
    at_step(monkeypatch, (0, 1), lambda _: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        result = train("--max-steps", 3)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert result.code == (0 if ignored else 128 + signal.SIGHUP)
    assert f"stopped at step {3 if ignored else 2} of 8" in result.out
    assert load(tmp_path / "out" / "last.pt")["progress"]["step"] == (3 if ignored else 2)


def test_closed_terminal(train: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output that cannot be written any more, as after a terminal was closed: the run goes on to its end."""

    def gone(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("builtins.print", gone)
    assert train("--epochs", 1).code == 0
    assert load(tmp_path / "out" / "last.pt")["progress"]["epoch"] == 1


@contextlib.contextmanager
def largest_file(megabytes: int) -> Iterator[None]:
    """The kernel refuses what is written beyond that size, in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("moment", [(1, 0), (1, 1)] if MANY else [(1, 0)])
def test_write_that_fails(
    moment: tuple[int, int], train: Cli, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of which the file system takes but a part: the old one stays, and the run can be resumed."""
    old: list[bytes] = []
    with contextlib.ExitStack() as limit, monkeypatch.context() as patch:

        def shrink(_: Learner) -> None:
            old.append((tmp_path / "out" / "last.pt").read_bytes())
            limit.enter_context(largest_file(20))
            if moment[1]:  # stopped in mid-epoch, and not only saved at its end
                os.kill(os.getpid(), signal.SIGTERM)

        at_step(patch, moment, shrink)
        assert_refused(train(), "cannot write", "last.pt", "free some space")
    assert (tmp_path / "out" / "last.pt").read_bytes() == old[0]
    assert_goes_on(train, tmp_path, whole)


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory."""
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("nothing can be mounted")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_full_disk(train: Cli, whole: Path, tmp_path: Path) -> None:
    """A disk that is full in the middle of a checkpoint: the old one stays, and with more space the run goes on."""
    with mounted(tmp_path / "out", "size=200m") as out:  # for two checkpoints of 90 MB
        result = train()
        assert_refused(result, "cannot write", "last.pt", "free some space")
        assert not [path for path in out.iterdir() if path.suffix == ".tmp"]
        assert load(out / "last.pt")["progress"]["epoch"] == 1
        subprocess.run(["mount", "-o", "remount,size=500m", out], check=True)
        assert_goes_on(train, tmp_path, whole)


@pytest.mark.parametrize("resumed", [False, True])
def test_read_only_folder(resumed: bool, train: Cli, tmp_path: Path) -> None:
    """A folder on a read-only file system."""
    with mounted(tmp_path / "out", "size=300m") as out:
        if resumed:
            assert train("--max-steps", 1).code == 0
        subprocess.run(["mount", "-o", "remount,ro", out], check=True)
        result = train(*(["--resume"] if resumed else []))
        assert_refused(result, "--out", str(out), "Read-only file system", "choose another folder")


def test_file_system_without_locks(train: Cli, begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has no locks: the run says so and trains, and removes no temporaries."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    left = begun.with_name(".last.pt.1.tmp")
    left.touch()
    monkeypatch.setattr(run_folder.fcntl, "lockf", refuse)
    result = train("--resume", "--max-steps", 2)
    assert (result.code, result.err.count("\n")) == (0, 1)
    assert "has no locks" in result.err and left.exists()


def test_temporaries_of_a_killed_run(train: Cli, begun: Path) -> None:
    """Temporary files of a run that was killed are removed by the next start; other files stay."""
    names = (".last.pt.123.tmp", ".metrics.jsonl.4.tmp", ".mine.5.tmp", ".last.pt.tmp")
    for name in names:
        begun.with_name(name).touch()
    assert train("--resume", "--max-steps", 2).code == 0
    assert [begun.with_name(name).exists() for name in names] == [False, False, True, True]


def test_checkpoint_that_another_run_replaces(
    train: Cli, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends after another has read its checkpoint, and before that has locked the folder."""
    claim = run_folder.claim

    def late(*arguments: object) -> object:
        shutil.copy(begun, begun.with_name("new"))
        begun.with_name("new").replace(begun)
        return claim(*arguments)

    monkeypatch.setattr(run_folder, "claim", late)
    assert_refused(train("--resume"), "another run has just written", str(begun), "start again")


def test_refused_start_changes_nothing(train: Cli, begun: Path) -> None:
    """A start that is refused after the folder was locked leaves its files."""
    before = {path.name: path.read_bytes() for path in begun.parent.iterdir() if path.name != ".lock"}
    assert_refused(train("--resume", "--max-steps", 1), "already stands")
    assert_refused(train("--resume", "--epochs", 1, "--arch", "resnet34"), "resnet34")
    assert {path.name: path.read_bytes() for path in begun.parent.iterdir() if path.name != ".lock"} == before


def test_resuming_elsewhere_replaces_no_run(train: Cli, begun: Path, tmp_path: Path) -> None:
    """--resume of one run into the folder of another: refused without --overwrite, and then none of it is left."""
    shutil.copytree(begun.parent, tmp_path / "other")
    (tmp_path / "other" / "best.pt").touch()
    resume = ("--resume", begun, "--max-steps", 2)
    assert_refused(train(*resume, out="other"), "already holds a run", "--overwrite")
    assert train(*resume, "--overwrite", out="other").code == 0
    assert not (tmp_path / "other" / "best.pt").exists()
    assert load(tmp_path / "other" / "last.pt")["progress"]["step"] == 2


def test_fewer_epochs_than_done(train: Cli, tmp_path: Path) -> None:
    """--epochs below what a checkpoint has done."""
    assert train("--max-steps", 5).code == 0
    assert_refused(train("--resume", "--epochs", 1), "stands in epoch 2", "--epochs 2 or more")


@pytest.mark.parametrize("number", [errno.ENOTCONN, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("call", ["stat", "scandir", "listdir"])
def test_unreachable_data(
    number: int, call: str, train: Cli, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of images whose server is gone when the run starts."""
    real = getattr(os, call)

    def refuse(path: object = ".", *arguments: object, **more: object) -> object:
        if str(path).startswith(str(images / "train")):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        result = train()
    assert_refused(result, str(images / "train"), os.strerror(number))
    assert not (tmp_path / "out").exists()


@only_many
def test_data_folder_that_vanishes(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole folder of images vanishes in mid-epoch, and comes back."""
    data = make_images(tmp_path / "data")

    def train(*options: object, out: str = "out") -> object:
        small = ("--image-size", 16, "--batch-size", 4, "--epochs", 1, "--workers", 0)
        return cli("train", "--data", data, *small, "--out", tmp_path / out, *options)

    with monkeypatch.context() as patch:
        at_step(patch, (0, 1), lambda _: data.rename(tmp_path / "elsewhere") and None)
        assert_refused(train(), "cannot read the image", str(data), "No such file")
    assert load(tmp_path / "out" / "last.pt")["progress"]["step"] == 2
    assert_refused(train("--resume"), str(data), "no such folder")
    (tmp_path / "elsewhere").rename(data)
    assert train(out="whole").code == 0
    assert_goes_on(train, tmp_path, tmp_path / "whole")
