"""Training in several processes: what a process group leaves behind, and a restart after a crash."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from resnet_fused.cli.data import open_source
from resnet_fused.cli.distributed import World
from resnet_fused.cli.learner import Learner
from resnet_fused.cli.settings import make_settings
from tests.cli.conftest import SMALL, assert_same_run, digests, load, torchrun

ONE_RANK = """
import os
import time
import torch
from resnet_fused.cli.data import open_source
from resnet_fused.cli.distributed import World, process_group
from resnet_fused.cli.learner import Learner
from resnet_fused.cli.settings import make_settings

def gloo_threads():
    time.sleep(0.5)  # a thread takes its name only once it runs
    tasks = os.listdir("/proc/self/task")
    return sum(open(f"/proc/self/task/{task}/comm").read().startswith(("gloo", "pt_gloo")) for task in tasks)

device, world = torch.device("cpu"), World(size=2)  # not one, which needs no group
with process_group(world, device):
    own = gloo_threads()
    learner = Learner("fused", make_settings({}, {}), open_source("digits", 32, 0), 1, device, world)
    both = gloo_threads()
    learner.release_process_group()
print(own, both - own, gloo_threads())
"""


def test_gloo_ends_before_the_interpreter() -> None:
    """A thread of the group that ranks agree by would abort a process that ends while it still has a tensor."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", ONE_RANK], env=os.environ | place, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    own, of_ddp, left = map(int, done.stdout.split())
    assert own > 0 and of_ddp > 0
    assert left <= of_ddp, "the group that ranks agree by has not ended; DDP's may have"


class OfTwo(World):
    """One of two processes that find the same."""

    def sum(self, values: Tensor) -> Tensor:
        return 2 * values


def test_progress_counts_all_processes() -> None:
    source, settings = open_source("digits", 32, 0), make_settings({}, {})
    learner = Learner("fused", settings, source, 1, torch.device("cpu"), World())
    learner.world = OfTwo(size=2)
    learner._pending.append(torch.tensor([1.5, 3.0], dtype=torch.float64))  # loss, correct
    learner.count_steps()
    progress = learner.progress
    assert (progress.losses, progress.correct) == ([1.5], 6)
    assert progress.images == 2 * settings.batch_size
    assert progress.loss == 1.5 * progress.images


#: As train.py, but that one of the processes is killed in the second epoch, the first time.
KILLED = """
import os
import signal
import sys
from resnet_fused.cli.learner import Learner
from resnet_fused.cli.main import main

step = Learner.step

def kill(self, *batch):
    first, here = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0", (self.progress.epoch, self.progress.step)
    if first and os.environ["RANK"] == "1" and here == (1, 1):
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, *batch)

Learner.step = kill
sys.exit(main(sys.argv[1:]))
"""


def test_two_processes(images: Path, tmp_path: Path) -> None:
    """Equal weights on both; the nine held-out images are counted once. A rank that is killed in mid-epoch changes
    nothing: the other saves the last step, and torchrun's restart goes on from it.
    """
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    options = ("train", "--data", images, *SMALL, "--resume", "auto", "--out")
    whole, restarted = tmp_path / "whole", tmp_path / "restarted"
    printed = torchrun("-m", "resnet_fused", *options, whole)
    assert printed.out.count("epoch 1/2") == 1
    assert "exitcode: -9" not in printed.err and "stopped at step" not in printed.out
    first, second = digests(printed.out)
    assert first == second
    records = load(whole / "last.pt")["progress"]["history"]
    assert [record["step"] for record in records] == [2, 4]
    for record in records:
        assert record["val_accuracy"] * 9 == pytest.approx(round(record["val_accuracy"] * 9), abs=1e-9)
        assert record["train_accuracy"] * 16 == pytest.approx(round(record["train_accuracy"] * 16), abs=1e-9)
    printed = torchrun("--max-restarts", 1, script, *options, restarted)
    assert "exitcode: -9" in printed.err
    assert "stopped at step 3 of 4; to go on:" in printed.out
    assert f"torchrun --nproc-per-node 2 -m resnet_fused train --out {restarted} --resume" in printed.out
    assert digests(printed.out) == [first, second]
    assert_same_run(whole / "last.pt", restarted / "last.pt")
    assert_same_run(whole / "best.pt", restarted / "best.pt")
