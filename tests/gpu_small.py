"""Small blocks through all kernels, for the memory checker: ``python -m tests.gpu_small [BACKEND [BLOCK ...]]``.

Forward and backward. Some blocks are run in bfloat16 alone; without any, all in both dtypes, and a model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

import resnet_fused
from tests.ops.test_residual_block import BLOCKS, fused, gradient_for, make_case, plain, results


def main(arguments: Sequence[str] = ()) -> int:
    if not torch.cuda.is_available():
        print("gpu_small needs a CUDA device and this machine has none", file=sys.stderr)
        return 2
    choices, names = arguments[:1] or ("triton", "vendor"), arguments[1:]
    for choice in choices:
        for name in names or BLOCKS:
            for dtype in (torch.bfloat16,) if names else (torch.float32, torch.bfloat16):
                case = make_case(name, "odd_size", dtype, "cuda")
                grad = gradient_for(plain(case.to(torch.float64), True).detach(), dtype)
                with resnet_fused.backend(choice):
                    for training in (True, False):
                        outputs = results(fused, case, grad, training, None)
                torch.cuda.synchronize()
                assert not any(x.isnan().any() for x in outputs.values()), (choice, name, dtype)
                print(choice, name, dtype, flush=True)
    if names:
        return 0
    model = resnet_fused.resnet18(num_classes=10).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64, device="cuda").to(memory_format=torch.channels_last)
    model(x).square().mean().backward()
    torch.cuda.synchronize()
    print("resnet18", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
