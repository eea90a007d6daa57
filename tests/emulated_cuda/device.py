"""The emulated device: builds the CUDA kernels with g++ and calls them on CPU tensors."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

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
GUARD = 64  # bytes on either side of an output that no kernel may touch
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


class Output:
    """A tensor for results: NaN (or 0xFF) all over, with a guard zone on either side.

    ``aligned`` False puts it one element past a 16-byte boundary.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False, aligned: bool = True
    ):
        count = torch.Size(shape).numel()
        size = torch.empty(0, dtype=dtype).element_size()
        start = GUARD + (0 if aligned else size)
        self._bytes = torch.full((start + count * size + GUARD,), CANARY, dtype=torch.uint8)
        self._inside = slice(start, start + count * size)
        flat = self._bytes[self._inside].view(dtype)
        flat.fill_(torch.nan if dtype.is_floating_point else 0xFF)
        if channels_last:
            n, c, h, w = shape
            self.tensor = flat.view(n, h, w, c).permute(0, 3, 1, 2)
        else:
            self.tensor = flat.view(shape)

    def check_guards(self) -> None:
        before, after = self._bytes[: self._inside.start], self._bytes[self._inside.stop :]
        assert (before == CANARY).all() and (after == CANARY).all(), "written outside of an output"


class Device:
    """Calls ops of one activation dtype, layout and alignment.

    Args:
        library: what build() returned.
        dtype: of the activations; every op sees them in this dtype.
        channels_last: their layout.
        aligned: False puts all activations one element past a 16-byte boundary, which rules out vector accesses.
    """

    def __init__(self, library: Path, dtype: torch.dtype, channels_last: bool, aligned: bool = True):
        self._library = ctypes.CDLL(str(library))
        self._library.call.restype = ctypes.c_char_p
        self._library.workspace_bytes.restype = ctypes.c_int64
        self.dtype, self.channels_last, self.aligned = dtype, channels_last, aligned
        self.statistics = torch.float64 if dtype == torch.float64 else torch.float32

    def activation(self, values: Tensor) -> Tensor:
        """``values`` rounded to the dtype, in the layout and alignment of this device."""
        to = Output(tuple(values.shape), self.dtype, self.channels_last, self.aligned).tensor
        return to.copy_(values)

    def __call__(
        self,
        op: str,
        inputs: Sequence[Tensor | None],
        size: torch.Size,
        like: int = 0,
        vectors: int = 0,
        pooled: bool = False,
        extra_bytes: tuple[int, ...] | None = None,
        eps: float = 0.0,
        initial: tuple[Tensor, ...] = (),
    ) -> list[Tensor]:
        """Runs ``op`` with the threads of a block in both orders, which must give the same bits.

        Args:
            op: its name.
            inputs: as in the schema.
            size: N, C, H, W of y.
            like: how many activations it returns, of y's size (or its pooled size).
            vectors: how many per-channel vectors it returns.
            pooled: whether the activations it returns are pooled.
            extra_bytes: shape of the uint8 tensor that it returns after the activations, if any.
            eps: of batch_norm_stats.
            initial: what the outputs hold before, where the op adds to them; vectors are then of its dtype.
        """
        first, second = (
            self._once(order, op, inputs, size, like, vectors, pooled, extra_bytes, eps, initial)
            for order in (0, 1)
        )
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        return first

    def _once(
        self,
        order: int,
        op: str,
        inputs: Sequence[Tensor | None],
        size: torch.Size,
        like: int,
        vectors: int,
        pooled: bool,
        extra_bytes: tuple[int, ...] | None,
        eps: float,
        initial: tuple[Tensor, ...],
    ) -> list[Tensor]:
        n, c, h, w = size
        shape = (n, c, (h + 1) // 2, (w + 1) // 2) if pooled else (n, c, h, w)
        outputs = [Output(shape, self.dtype, self.channels_last, self.aligned) for _ in range(like)]
        if extra_bytes is not None:
            images = len(extra_bytes) == 4  # indices; a mask is a matrix
            outputs.append(Output(extra_bytes, torch.uint8, images and self.channels_last))
        vector_dtype = initial[-1].dtype if initial else self.statistics
        outputs += [Output((c,), vector_dtype) for _ in range(vectors)]
        for output, values in zip(outputs, initial, strict=False):
            output.tensor.copy_(values)

        sizes = (ctypes.c_int64 * 4)(*size)
        layout, dtype = int(self.channels_last), DTYPES.index(self.dtype)
        bytes_needed = self._library.workspace_bytes(sizes, layout, dtype)
        workspace = Output((bytes_needed // 8 + 1,), torch.float64)
        workspace.tensor.view(torch.float32).fill_(torch.nan)
        tensors = [*inputs, *(o.tensor for o in outputs)]
        pointers = (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))

        self._library.set_reverse_order(order)
        error = self._library.call(
            op.encode(),
            pointers,
            sizes,
            layout,
            dtype,
            ctypes.c_double(eps),
            ctypes.c_void_p(workspace.tensor.data_ptr()),
        )
        assert error is None, error
        for output in (*outputs, workspace):
            output.check_guards()
        return [o.tensor for o in outputs]
