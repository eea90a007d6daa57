"""Agreement among the ranks of a distributed job: the first rank that asks for a tuning key answers for all.

Through the job's store, and without a collective: a rank that never asks makes no other wait.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch.distributed as dist

from resnet_fused.kernels.autotune import cache
from resnet_fused.kernels.autotune.tunable import Timings, TuningKey


def process_group() -> dist.ProcessGroup | None:
    """The ranks that have to agree; None outside of a distributed job."""
    is_distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if is_distributed else None


def agree(
    device_name: str, key: TuningKey, may_measure: bool, find: Callable[[], Timings | None]
) -> Timings | None:
    """What ``find`` returns on the first rank that asks; None if it fails there, on every other rank and from then on.

    Raises:
        Exception: ``find`` raises it on this rank.
    """
    from torch.distributed import PrefixStore, distributed_c10d

    store = PrefixStore("resnet_fused/tuning", distributed_c10d._get_default_store())
    entry = "/".join((device_name, "measured" if may_measure else "known", json.dumps(key)))
    if store.add(f"{entry}/claim", 1) != 1:
        answer = json.loads(store.get(f"{entry}/answer"))
        if answer["failure"] is not None:
            failed = f"the rank that was to measure it failed with {answer['failure']}"
            cache.warn_once(entry, f"{key} is not autotuned: {failed}")
        return None if answer["timings"] is None else cache.timings_from_json(answer["timings"])
    failure: str | None = "an interrupt"
    timings = None
    try:
        timings = find()
        failure = None
    except Exception as error:
        failure = repr(error)
        raise
    finally:  # whatever happened: the other ranks wait for the answer
        rows = None if timings is None else cache.timings_to_json(timings)
        store.set(f"{entry}/answer", json.dumps({"timings": rows, "failure": failure}))
    return timings
