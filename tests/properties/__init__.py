"""Property tests: whatever hypothesis draws, fused results agree with eager PyTorch's."""

from tests import torchvision_ops  # noqa: F401  # before torchvision
