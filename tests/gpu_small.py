"""Small blocks for the memory checker, in bfloat16: ``python -m tests.gpu_small BACKEND BLOCK ...``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

import resnet_fused
from tests.ops.test_residual_block import fused, gradient_for, make_case, plain, results


def main(arguments: Sequence[str]) -> int:
    if not torch.cuda.is_available():
        print("gpu_small needs a CUDA device and this machine has none", file=sys.stderr)
        return 2
    choice, *names = arguments
    for name in names:
        case = make_case(name, "odd_size", torch.bfloat16, "cuda")
        grad = gradient_for(plain(case.to(torch.float64), True).detach(), torch.bfloat16)
        with resnet_fused.backend(choice):
            for training in (True, False):
                outputs = results(fused, case, grad, training, None)
        torch.cuda.synchronize()
        assert not any(x.isnan().any() for x in outputs.values()), (choice, name)
        print(choice, name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
