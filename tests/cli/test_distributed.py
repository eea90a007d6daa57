"""What a process group leaves behind."""

import os
import subprocess
import sys

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
