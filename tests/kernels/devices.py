"""Where Triton kernels can be tested: on a GPU, and through the interpreter in a process of its own.

TRITON_INTERPRET=1 must be set before triton is imported. In bfloat16 the interpreter is silently wrong.
"""

from __future__ import annotations

import pytest
import torch

from resnet_fused.backend import interprets

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interpreter),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
DTYPES = [torch.float32, torch.float16] if interprets() else [torch.float32, torch.bfloat16, torch.float16]
