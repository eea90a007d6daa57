"""`--augment trivial` and `--augment rand`: torchvision's policies, which follow the standard augmentation."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from resnet_fused.cli.errors import UserError, require

#: The option, and the class of torchvision.transforms.
POLICIES = {"trivial": "TrivialAugmentWide", "rand": "RandAugment"}


class Policy:
    """An augmentation that is a function of the image and a key.

    Args:
        name: one of `POLICIES`.

    Raises:
        UserError: torchvision is not installed, or does not fit torch.
    """

    def __init__(self, name: str) -> None:
        try:
            transforms = require("torchvision.transforms", extra="augment")
        except RuntimeError as error:  # of operators that its extension has not registered
            raise UserError(
                f"--augment {name} needs a torchvision that fits torch {torch.__version__} ({error}): install both "
                "from the same index"
            ) from error
        self._transform = getattr(transforms, POLICIES[name])()

    def __call__(self, image: Tensor, key: str) -> Tensor:
        """Augments an image.

        Args:
            image: uint8 [S, S, 3].
            key: images of equal keys are augmented alike.
        """
        # torchvision draws from the global generator, which belongs to the model where there are no workers.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(random.Random(f"{key}/policy").getrandbits(62))
            augmented: Tensor = self._transform(image.permute(2, 0, 1))
        return augmented.permute(1, 2, 0).contiguous()


def make_policy(augment: str) -> Policy | None:
    """The policy of an `--augment`; None where it is none or standard."""
    return Policy(augment) if augment in POLICIES else None
