"""Builds resnet_fused._C: one binary for every torch >= 2.10 and CPython >= 3.9 (stable ABI).

RESNET_FUSED_BUILD chooses what goes in:
  auto  CPU kernels, and CUDA kernels where nvcc is found and torch is a CUDA build (the default)
  cpu   CPU kernels only
  cuda  CPU and CUDA kernels; fails where there is no nvcc
  none  no extension: every op runs its PyTorch reference
TORCH_CUDA_ARCH_LIST chooses the CUDA architectures, as for any torch extension; no GPU has to be visible.
"""

from __future__ import annotations

import os
import sys
from glob import glob
from typing import Any

from setuptools import setup

MODES = ("auto", "cpu", "cuda", "none")
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"


def extension(mode: str) -> dict[str, Any]:
    """The setup() arguments that build the extension for one of MODES."""
    if mode not in MODES:
        sys.exit(f"RESNET_FUSED_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "none":
        return {}
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    with_cuda = mode == "cuda" or (
        mode == "auto" and CUDA_HOME is not None and torch.version.cuda is not None
    )
    if with_cuda and CUDA_HOME is None:
        sys.exit("RESNET_FUSED_BUILD=cuda needs nvcc: put it on PATH or set CUDA_HOME")

    # -ffp-contract and -fno-* change neither the order of sums nor NaN handling: this is not fast-math.
    cxx = ["-O3", "-std=c++17", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fvisibility=hidden"]
    cxx += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
    cxx += ["-g0"]  # Python's own flags ask for debug information, which takes half of the compile time
    sources = ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))]
    defines: list[tuple[str, str | None]] = [("TORCH_TARGET_VERSION", "0x020b000000000000")]
    if with_cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        sources += sorted(glob("csrc/cuda/*.cu"))
        defines.append(("USE_CUDA", None))
    module = (CUDAExtension if with_cuda else CppExtension)(
        "resnet_fused._C",
        sources,
        include_dirs=[os.path.join(os.path.dirname(os.path.abspath(__file__)), "csrc")],
        define_macros=defines,
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-std=c++17"]},
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension(os.environ.get("RESNET_FUSED_BUILD", "auto")))
