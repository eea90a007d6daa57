"""The door to the C++/CUDA extension: loads it, or keeps the reason why it could not be loaded.

Loading registers the kernels for the ops of resnet_fused.ops under the CPU and CUDA dispatch keys. Without
them the same ops run their PyTorch reference.
"""

from __future__ import annotations

from importlib.util import find_spec

#: Why the extension is missing; None when it is loaded.
missing_reason: str | None = None
#: Whether the CUDA kernels are loaded.
has_cuda = False

if find_spec("resnet_fused._C") is None:
    missing_reason = (
        "resnet_fused._C is not built: run `pip install --no-build-isolation .` with a C++ compiler"
    )
else:
    try:
        from resnet_fused import _C
    except ImportError as error:
        missing_reason = f"resnet_fused._C does not load here: {error}"
    else:
        has_cuda = _C.built_with_cuda()

is_loaded = missing_reason is None


def release_buffers() -> int:
    """Gives memory back to the system that large results on the CPU have used and others could use again.

    Returns:
        how many bytes.
    """
    return _C.release_buffers() if is_loaded else 0
