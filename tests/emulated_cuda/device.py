"""The emulated device: builds the CUDA kernels with g++ and calls them on CPU tensors."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_fused.layout import is_channels_last

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of kernels.h
FLAGS = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",  # it takes the fibers' longjmp from stack to stack for a mistake
    "-DRESNET_FUSED_MULTIPROCESSORS=10",
)
SANITIZER = ("-fsanitize=undefined", "-fno-sanitize-recover")
GUARD = 64  # bytes on either side of a tensor that no kernel may touch
CANARY = 0xA5


def build(folder: Path, sanitizer: tuple[str, ...] = SANITIZER) -> Path:
    """Compiles every kernel for the emulation.

    Args:
        folder: where objects and library go.
        sanitizer: its flags; others than the default serve a build by hand, with -fsanitize=address say.

    Returns:
        the shared library.

    Raises:
        RuntimeError: g++ failed; the message is its output.
    """
    sources = [*sorted((CSRC / "cuda").glob("*.cu")), *sorted(HERE.glob("*.cpp"))]
    objects = [folder / f"{source.name}.o" for source in sources]
    includes = ["-I", str(CSRC), "-I", str(HERE / "include")]

    def run(*arguments: str) -> None:
        done = subprocess.run(
            ["g++", *FLAGS, *sanitizer, *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(done.stderr)

    def compile_one(source: Path, target: Path) -> None:
        run("-x", "c++", *includes, "-c", str(source), "-o", str(target))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources, objects))
    library = folder / "libemulated_cuda.so"
    run("-shared", *map(str, objects), "-o", str(library))
    return library


class Guarded:
    """Memory of a tensor's shape, dtype and strides: NaN (or 0xFF) all over, with a guard zone on either side.

    ``aligned`` False puts it one element past a 16-byte boundary.
    """

    def __init__(self, like: Tensor, aligned: bool = True) -> None:
        size = like.element_size()
        start = GUARD + (0 if aligned else size)
        self._bytes = torch.full((start + like.numel() * size + GUARD,), CANARY, dtype=torch.uint8)
        self._inside = slice(start, start + like.numel() * size)
        flat = self._bytes[self._inside].view(like.dtype)
        flat.fill_(torch.nan if like.is_floating_point() else 0xFF)
        self.tensor = flat.as_strided(like.shape, like.stride(), flat.storage_offset())

    def check(self) -> None:
        before, after = self._bytes[: self._inside.start], self._bytes[self._inside.stop :]
        assert (before == CANARY).all() and (after == CANARY).all(), "written outside of a tensor"


class Device:
    """Calls ops.

    Args:
        library: what build() returned.
        aligned: False puts all activations one element past a 16-byte boundary, which rules out vector accesses.
    """

    def __init__(self, library: Path, aligned: bool = True) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.call.restype = ctypes.c_char_p
        self._library.workspace_bytes.restype = ctypes.c_int64
        self.aligned = aligned

    def __call__(self, op: str, arguments: Sequence[Any], like: Sequence[Tensor]) -> list[Tensor]:
        """Results, laid out as ``like``, and after them the tensors among the arguments, which an op may write to.

        It runs with the threads of a block in both orders, which must give the same bits.
        """
        first, second = (self._once(order, op, arguments, like) for order in (0, 1))
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        return first

    def _once(self, order: int, op: str, arguments: Sequence[Any], like: Sequence[Tensor]) -> list[Tensor]:
        def place(x: Tensor) -> Guarded:
            return Guarded(x, self.aligned or x.dim() != 4 or not x.is_floating_point())

        guarded = {i: place(x) for i, x in enumerate(arguments) if isinstance(x, Tensor)}
        for i, copy in guarded.items():
            copy.tensor.copy_(arguments[i])
        results = [place(x) for x in like]
        y = arguments[2 if "maxpool_backward" in op else 0]
        sizes = (ctypes.c_int64 * 4)(*y.shape)
        layout, dtype = int(is_channels_last(y)), DTYPES.index(y.dtype)
        bytes_needed = self._library.workspace_bytes(sizes, layout, dtype)
        workspace = Guarded(torch.empty(bytes_needed // 8 + 1, dtype=torch.float64))
        workspace.tensor.view(torch.float32).fill_(torch.nan)
        # None and False are null, True is any other address; eps is an argument of its own.
        eps = next((x for x in arguments if isinstance(x, float)), 0.0)
        pointers = [
            guarded[i].tensor.data_ptr() if i in guarded else (id(x) if x is True else None)
            for i, x in enumerate(arguments)
            if not isinstance(x, float)
        ]
        pointers += [result.tensor.data_ptr() for result in results]
        self._library.set_reverse_order(order)
        error = self._library.call(
            op.encode(),
            (ctypes.c_void_p * len(pointers))(*pointers),
            sizes,
            layout,
            dtype,
            ctypes.c_double(eps),
            ctypes.c_void_p(workspace.tensor.data_ptr()),
        )
        assert error is None, error
        for memory in (*guarded.values(), *results, workspace):
            memory.check()
        return [memory.tensor for memory in (*results, *guarded.values())]
