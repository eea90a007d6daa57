"""benchmarks.kernel_resources: what Triton would specialise, and what toy kernels need on some architectures."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import kernel_resources
from benchmarks.kernel_resources import (
    ARCHITECTURES,
    CompileError,
    Resources,
    Specialisation,
    compile_all,
    compiled,
    is_unsafe,
    main,
    specialisation,
    violations,
    widest_load,
)
from resnet_fused.kernels.launch import Config, Launch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def product_kernel(
    a, b, out, M, N, K,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = tl.load(a + m[:, None] * K + k[None, :], (m < M)[:, None] & (k < K)[None, :], other=0.0)
        y = tl.load(b + k[:, None] * N + n[None, :], (k < K)[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out + m[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), inside)


@triton.jit
def relu_product_kernel(
    a, b, out, M, N, K,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of which the first operand is computed."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = tl.load(a + m[:, None] * K + k[None, :], (m < M)[:, None] & (k < K)[None, :], other=0.0)
        y = tl.load(b + k[:, None] * N + n[None, :], (k < K)[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(tl.maximum(x, 0.0).to(y.dtype), y, acc, input_precision=PRECISION)
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out + m[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), inside)


@triton.jit
def scale_kernel(x, shift, out, SIZE, factor, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, place < SIZE, 0.0).to(tl.float32)
    # All of a tile has to be held until its sum is known.
    value = value / tl.sum(value) * factor
    if shift is not None:
        value += tl.load(shift)
    tl.store(out + place, value.to(out.dtype.element_ty), place < SIZE)


@triton.jit
def everything_kernel(
    x, nothing, small, large, one, aligned, yes, real, plain, BLOCK: tl.constexpr, NAME: tl.constexpr
):
    tl.store(x, small + large + one + aligned + yes + real + plain)


@triton.jit
def wrong_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), 0.0)  # a range must be a power of two long


def product(
    dtype: torch.dtype = torch.bfloat16,
    size: int = 256,
    config: Config = Config(64, 64, 32, 4, 3),  # noqa: B008 - frozen
    precision: str = "tf32",
) -> Launch:
    a, b, out = (torch.empty(size, size, 1, 1, dtype=dtype, device="meta") for _ in range(3))
    sizes = dict.fromkeys("MNK", size)
    constants = {"PRECISION": precision, **config.blocks()}
    return Launch(product_kernel, (1,), {"a": a, "b": b, "out": out, **sizes}, constants, config)


def scale(block: int = 1024, size: int = 1 << 20, warps: int = 4) -> Launch:
    x, out = (torch.empty(size, dtype=torch.bfloat16, device="meta") for _ in range(2))
    arguments = {"x": x, "shift": None, "out": out, "SIZE": size, "factor": 0.5}
    return Launch(scale_kernel, (1,), arguments, {"BLOCK": block}, Config(block, warps=warps))


def wrong() -> Launch:
    return Launch(wrong_kernel, (1,), {"x": torch.empty(3, device="meta")}, {"BLOCK": 3}, Config())


#: A program of one warp cannot hold this many numbers.
SPILLING = {"block": 16384, "warps": 1}


def test_signature() -> None:
    what = specialisation(product())
    assert what.name == "product"
    assert what.config == "64x64x32 4w3s" == str(Config(64, 64, 32, 4, 3))
    assert dict(what.signature) == {
        "a": "*bf16", "b": "*bf16", "out": "*bf16", "M": "i32", "N": "i32", "K": "i32",
        "PRECISION": "constexpr", "BLOCK_M": "constexpr", "BLOCK_N": "constexpr", "BLOCK_K": "constexpr",
    }  # fmt: skip
    assert what.divisible == (0, 1, 2, 3, 4, 5)
    assert specialisation(product(size=33)).divisible == (0, 1, 2)


def test_equal_where_triton_compiles_once() -> None:
    assert specialisation(product(size=256)) == specialisation(product(size=512))
    splits = replace(product(), config=Config(64, 64, 32, 4, 3, splits=7))
    different = {
        specialisation(x)
        for x in (
            product(),
            splits,
            product(size=33),
            product(torch.float16),
            product(precision="ieee"),
            product(config=Config(64, 64, 32, 8, 3)),
            product(config=Config(64, 64, 32, 4, 2)),
            product(config=Config(128, 64, 32, 4, 3)),
        )
    }
    assert len(different) == 7
    assert len({(x.config, x.details) for x in different}) == 7


def test_can_be_sent_to_another_process() -> None:
    what = specialisation(scale())
    assert pickle.loads(pickle.dumps(what)) == what
    assert what.function() is scale_kernel


@pytest.mark.parametrize("value", [0, 2, 16, 17, -16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**40 + 1])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float16, torch.float64])
def test_is_what_triton_specialises(value: int, dtype: torch.dtype) -> None:
    """Held against the function that Triton's own launches go through."""
    jit = pytest.importorskip("triton.runtime.jit")
    compiler = pytest.importorskip("triton.backends.compiler")
    if not hasattr(jit, "native_specialize_impl"):
        pytest.skip("this Triton specialises in another way")
    arguments: dict[str, Any] = {
        "x": torch.empty(4, dtype=dtype, device="meta"), "nothing": None, "small": value, "large": value + 2**33,
        "one": 1, "aligned": 64, "yes": True, "real": 1.0, "plain": 3,
    }  # fmt: skip
    what = specialisation(
        Launch(everything_kernel, (1,), arguments, {"BLOCK": 16, "NAME": "D"}, Config(16, warps=8, stages=1))
    )
    expected = {
        name: jit.native_specialize_impl(compiler.BaseBackend, x, False, True, True)
        for name, x in arguments.items()
    }
    assert dict(what.signature) == {
        **{name: kind for name, (kind, _) in expected.items()}, "BLOCK": "constexpr", "NAME": "constexpr"
    }  # fmt: skip
    assert what.divisible == tuple(i for i, (_, key) in enumerate(expected.values()) if key == "D")
    assert dict(what.constants) == {"nothing": None, "one": 1, "BLOCK": 16, "NAME": "D"}
    assert (what.warps, what.stages) == (8, 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"SIZE": "many"}, "scale_kernel: SIZE is 'many', which kernels do not take"),
        ({"x": torch.empty(1, dtype=torch.complex64)}, "scale_kernel: x is a tensor of torch.complex64"),
        ({"SIZE": 2**63}, "scale_kernel: SIZE is 9223372036854775808"),
    ],
)
def test_refuses_what_kernels_do_not_take(changed: dict[str, Tensor | str | int], message: str) -> None:
    launch = scale()
    with pytest.raises(TypeError, match=message):
        specialisation(replace(launch, arguments={**launch.arguments, **changed}))


def test_refuses_a_missing_argument() -> None:
    with pytest.raises(TypeError, match="scale_kernel: BLOCK is not given"):
        specialisation(replace(scale(), constants={}))


def test_refuses_a_local_kernel() -> None:
    @triton.jit
    def local_kernel(x):  # type: ignore[no-untyped-def]
        tl.store(x, 0)

    with pytest.raises(ValueError, match="local_kernel is local"):
        specialisation(Launch(local_kernel, (1,), {"x": torch.empty(1)}, {}, Config()))


def test_refuses_interpreted_kernels() -> None:
    from triton.runtime.interpreter import InterpretedFunction

    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        specialisation(replace(scale(), kernel=InterpretedFunction(scale_kernel.fn)))


@pytest.fixture(scope="module")
def matrix_on_80() -> Resources:
    return compiled(specialisation(product()), 80)


@pytest.fixture(scope="module")
def matrix_on_90() -> Resources:
    return compiled(specialisation(product()), 90)


@pytest.fixture(scope="module")
def spilling() -> Resources:
    return compiled(specialisation(scale(**SPILLING)), 90)


def test_a_matrix_product(matrix_on_80: Resources, matrix_on_90: Resources) -> None:
    assert matrix_on_80.mma and not matrix_on_80.wgmma
    assert matrix_on_90.mma == matrix_on_90.wgmma != 0
    for found, arch in ((matrix_on_80, 80), (matrix_on_90, 90)):
        assert found.products == {"bf16"}
        assert 0 < found.registers <= 255
        assert found.spill_bytes == 0
        # Two or three stages of two tiles.
        assert found.shared_bytes in (2 * 8192, 3 * 8192)
        assert found.vector_load_bytes == 16
        assert violations(specialisation(product()), arch, found) == []


def test_blackwell_multiplies_in_tensor_memory() -> None:
    what = specialisation(product(torch.float16))
    found = compiled(what, 100)
    assert found.products == {"f16"}
    assert found.mma
    assert violations(what, 100, found) == []


def test_narrow_loads_where_rows_are_not_aligned() -> None:
    assert compiled(specialisation(product(size=33)), 80).vector_load_bytes == 2


@pytest.mark.parametrize(("precision", "products"), [("tf32", {"tf32"}), ("ieee", {"f32"})])
def test_precision_of_float32(precision: str, products: set[str]) -> None:
    what = specialisation(product(torch.float32, precision=precision))
    found = compiled(what, 80)
    assert found.products == products
    assert bool(found.mma) == (precision == "tf32")
    # IEEE products have no tensor cores to be missed.
    assert violations(what, 80, found) == []


def test_elementwise() -> None:
    what = specialisation(scale())
    found = compiled(what, 90)
    assert (found.mma, found.wgmma, found.spill_bytes, found.vector_load_bytes) == (None, 0, 0, 16)
    assert found.products == set()
    assert violations(what, 90, found) == []


def test_spills_are_found(spilling: Resources) -> None:
    assert spilling.spill_bytes > 0
    (line,) = violations(specialisation(scale(**SPILLING)), 90, spilling)
    assert line.startswith(
        f"scale 16384 1w3s on sm_90: spills {spilling.spill_bytes} bytes (*bf16; without shift"
    )


def test_too_much_shared_memory_is_found(matrix_on_90: Resources) -> None:
    what = specialisation(product())
    for arch, limit in ARCHITECTURES.items():
        assert violations(what, arch, replace(matrix_on_90, shared_bytes=limit)) == []
        (line,) = violations(what, arch, replace(matrix_on_90, shared_bytes=limit + 1))
        assert f"on sm_{arch}: needs {limit + 1} bytes of shared memory of {limit}" in line


def test_too_many_registers_for_one_program_are_found(matrix_on_90: Resources) -> None:
    what, most = replace(specialisation(product()), warps=16), replace(matrix_on_90, registers=128)
    assert violations(what, 80, replace(most, wgmma=0)) == []
    (line,) = violations(what, 80, replace(most, wgmma=0, registers=136))
    assert "needs 136 registers in each of 512 threads" in line


def test_missing_tensor_cores_are_found(matrix_on_90: Resources) -> None:
    what = specialisation(product())
    without = replace(matrix_on_90, mma=0, wgmma=0)
    assert "multiplies without tensor cores" in violations(what, 80, without)[0]
    assert "multiplies without tensor cores" in violations(what, 90, without)[0]
    older = replace(matrix_on_90, mma=16, wgmma=0)
    assert violations(what, 80, older) == []
    assert "multiplies without wgmma" in violations(what, 90, older)[0]
    assert violations(what, 90, replace(older, products=frozenset({"tf32"}))) == []


def test_what_does_not_compile_says_why() -> None:
    what = specialisation(wrong())
    with pytest.raises(CompileError, match=r"(?s)wrong 3 4w3s on sm_80 does not compile: .*power of 2"):
        compiled(what, 80)


@pytest.mark.parametrize(
    ("instruction", "size"),
    [
        ("ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", 16),
        ("ld.global.L1::evict_last.v2.b64 { %rd2, %rd3 }, [ %rd1 + 0 ];", 16),
        ("ld.global.nc.L1::no_allocate.L2::128B.v8.b32 { %r1 }, [ %rd1 + 0 ];", 32),
        ("ld.global.b16 { %rs1 }, [ %rd1 + 0 ];", 2),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", 16),
        ("cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;", 4),
        ("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1];", 16),
        ("st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };", 0),
        ("ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r5 ];", 0),
    ],
)
def test_widest_load(instruction: str, size: int) -> None:
    assert widest_load(f"\t@%p1 {instruction}\n") == size
    assert widest_load(f"ld.global.b8 x;\n\t{instruction}\n") == max(1, size)


class FakePlan(ModuleType):
    """In the place of resnet_fused.plan."""

    given: list[Launch]

    def launches(self, arch: str, batch: int, dtype: str, capability: int) -> list[Launch]:
        if arch != "toy":
            raise ValueError(f"unknown arch {arch!r}")
        return self.given


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePlan]:
    fake = FakePlan("resnet_fused.plan")
    fake.given = [product(), scale(), product()]
    monkeypatch.setitem(kernel_resources.sys.modules, "resnet_fused.plan", fake)
    yield fake


def test_rows(plan: FakePlan, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "--model", "toy", "--arch", "90", "80", "--processes", "2"]) == 0
    told = capsys.readouterr()
    rows = json.loads(told.out)
    keys = "kernel arch config registers spill_bytes shared_bytes mma vector_load_bytes serialized"
    assert {" ".join(x) for x in rows} == {keys}
    assert [(x["kernel"], x["arch"]) for x in rows] == [
        ("product", "sm_90"), ("scale", "sm_90"), ("product", "sm_80"), ("scale", "sm_80")
    ]  # fmt: skip
    assert rows[0]["config"] == "64x64x32 4w3s; *bf16; PRECISION=tf32"
    assert rows[3]["config"] == "1024 4w3s; *bf16; without shift; not by 16: factor"
    assert rows[0]["mma"] > 0 and rows[3]["mma"] is None
    assert told.err.endswith("\r4 of 4 compiled\n")


def test_violations_are_told(plan: FakePlan, capsys: pytest.CaptureFixture[str]) -> None:
    plan.given = [scale(**SPILLING), wrong()]
    assert main(["--model", "toy", "--arch", "90", "--dtype", "bf16", "--processes", "1"]) == 1
    told = capsys.readouterr()
    table = told.out.splitlines()
    assert table[0].split() == [
        "kernel",
        "arch",
        "registers",
        "spilled",
        "shared",
        "mma",
        "load",
        "serial",
        "config",
    ]
    assert table[1].split()[:2] == ["scale", "sm_90"]
    assert len(table) == 2
    assert "scale 16384 1w3s on sm_90: spills" in told.err
    assert "on sm_90 does not compile" in told.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "75"], "unknown --arch 75: choose of 80, 86, 89, 90, 100, 120"),
        (["--dtype", "int8"], "unknown --dtype int8: choose of bf16, fp16, tf32, fp32"),
        (["--processes", "0"], "--processes must be positive, got 0"),
        (["--model", "vgg"], "unknown arch 'vgg'"),
    ],
)
def test_bad_input(
    plan: FakePlan, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_interpreter_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        main([])
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


def test_a_computed_first_operand_is_unsafe() -> None:
    """Held in registers, it is changed while wgmma may still read it; ptxas serializes some of such kernels."""
    safe = product(config=Config(128, 64, 64, 4, 4))
    unsafe = replace(safe, kernel=relu_product_kernel)
    pairs = [(specialisation(x), 90) for x in (safe, unsafe)]
    found = [compiled(*pair) for pair in pairs]
    assert [(x.unsafe, x.serialized) for x in found] == [(False, False), (True, True)]
    (line,) = violations(*pairs[1], found[1])
    assert "may read registers while they change" in line
    assert {what.name: x for what, _, x in compile_all(pairs, is_unsafe)} == {
        "product": False, "relu_product": True
    }  # fmt: skip


def test_compile_all_gives_every_pair() -> None:
    pairs: list[tuple[Specialisation, int]] = [(specialisation(scale()), 80), (specialisation(wrong()), 80)]
    found = {(what, arch): result for what, arch, result in compile_all(pairs)}
    assert set(found) == set(pairs)
    assert isinstance(found[pairs[0]], Resources)
    assert "does not compile" in str(found[pairs[1]])
