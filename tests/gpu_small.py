"""Small blocks through all kernels, forward and backward, for the memory checker: ``python -m tests.gpu_small``."""

from __future__ import annotations

import sys

import torch

import resnet_fused
from tests.ops.test_residual_block import BLOCKS, fused, gradient_for, make_case, plain, results


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu_small needs a CUDA device and this machine has none", file=sys.stderr)
        return 2
    for choice in ("triton", "vendor"):
        for name in BLOCKS:
            for dtype in (torch.float32, torch.bfloat16):
                case = make_case(name, "odd_size", dtype, "cuda")
                grad = gradient_for(plain(case.to(torch.float64), True).detach(), dtype)
                with resnet_fused.backend(choice):
                    for training in (True, False):
                        found = results(fused, case, grad, training, None)
                torch.cuda.synchronize()
                assert not any(x.isnan().any() for x in found.values()), (choice, name, dtype)
                print(choice, name, dtype, flush=True)
    model = resnet_fused.resnet18(num_classes=10).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64, device="cuda").to(memory_format=torch.channels_last)
    model(x).square().mean().backward()
    torch.cuda.synchronize()
    print("resnet18", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
