"""tools.kernel_resources: what Triton would specialise, and what toy kernels need on some architectures."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import pytest
import torch

from resnet_fused.kernels.launch import Config, Launch
from tools import kernel_resources
from tools.kernel_resources import (
    ARCHITECTURES,
    CompileError,
    Resources,
    compile_all,
    compiled,
    is_unsafe,
    main,
    specialisation,
    violations,
    widest_load,
)

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def product_kernel(
    a, b, out, M, N, K,
    PRECISION: tl.constexpr, RELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = tl.load(a + m[:, None] * K + k[None, :], (m < M)[:, None] & (k < K)[None, :], other=0.0)
        y = tl.load(b + k[:, None] * N + n[None, :], (k < K)[:, None] & (n < N)[None, :], other=0.0)
        if RELU:  # the first operand is computed
            x = tl.maximum(x, 0.0).to(y.dtype)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
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
def wrong_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), 0.0)  # a range must be a power of two long


def product(
    dtype: torch.dtype = torch.bfloat16,
    size: int = 256,
    config: Config = Config(64, 64, 32, 4, 3),  # noqa: B008 - frozen
    precision: str = "tf32",
    relu: bool = False,
) -> Launch:
    a, b, out = (torch.empty(size, size, 1, 1, dtype=dtype, device="meta") for _ in range(3))
    sizes = dict.fromkeys("MNK", size)
    constants = {"PRECISION": precision, "RELU": relu, **config.blocks()}
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
        **dict.fromkeys(("PRECISION", "RELU", "BLOCK_M", "BLOCK_N", "BLOCK_K"), "constexpr"),
    }  # fmt: skip
    assert what.divisible == (0, 1, 2, 3, 4, 5)
    assert specialisation(product(size=33)).divisible == (0, 1, 2)
    assert dict(specialisation(scale()).constants) == {"shift": None, "BLOCK": 1024}
    assert pickle.loads(pickle.dumps(what)) == what


def test_equal_where_triton_compiles_once() -> None:
    same = product(), product(size=512), product()._replace(config=Config(64, 64, 32, 4, 3, splits=7))
    assert len({specialisation(x) for x in same}) == 1
    others = (
        product(size=33),
        product(torch.float16),
        product(precision="ieee"),
        product(config=Config(64, 64, 32, 8, 3)),
        product(config=Config(64, 64, 32, 4, 2)),
        product(config=Config(128, 64, 32, 4, 3)),
    )
    different = {specialisation(x) for x in (product(), *others)}
    assert len(different) == len({(x.config, x.details) for x in different}) == 7


def test_the_active_driver_is_restored() -> None:
    from triton.runtime import driver

    before = driver._active
    specialisation(scale(), 80)
    assert driver._active is before


@pytest.fixture(scope="module")
def on_90() -> Resources:
    return compiled(specialisation(product()), 90)


def test_a_gemm(on_90: Resources) -> None:
    on_80 = compiled(specialisation(product()), 80)
    assert on_80.mma and not on_80.wgmma
    assert on_90.mma == on_90.wgmma != 0
    for resources, arch in ((on_80, 80), (on_90, 90)):
        assert resources.operands == {"bf16"}
        assert 0 < resources.registers <= 255
        assert resources.spill_bytes == 0
        assert resources.shared_bytes in (2 * 8192, 3 * 8192)  # two or three stages of two tiles
        assert resources.vector_load_bytes == 16
        assert violations(specialisation(product()), arch, resources) == []


def test_blackwell_multiplies_in_tensor_memory() -> None:
    what = specialisation(product(torch.float16))
    resources = compiled(what, 100)
    assert resources.operands == {"f16"} and resources.mma and violations(what, 100, resources) == []


@pytest.mark.parametrize(("precision", "operands"), [("tf32", {"tf32"}), ("ieee", {"f32"})])
def test_precision_of_float32(precision: str, operands: set[str]) -> None:
    """IEEE GEMMs have no tensor cores to be missed."""
    what = specialisation(product(torch.float32, precision=precision))
    resources = compiled(what, 80)
    assert resources.operands == operands and bool(resources.mma) == (precision == "tf32")
    assert violations(what, 80, resources) == []


def test_pointwise_and_spilling() -> None:
    resources = compiled(specialisation(scale()), 90)
    assert (resources.mma, resources.wgmma, resources.spill_bytes, resources.vector_load_bytes) == (
        None,
        0,
        0,
        16,
    )
    assert resources.operands == set()
    what = specialisation(scale(**SPILLING))
    resources = compiled(what, 90)
    (line,) = violations(what, 90, resources)
    assert resources.spill_bytes > 0
    assert line.startswith(
        f"scale 16384 1w3s on sm_90: spills {resources.spill_bytes} bytes (*bf16; without shift"
    )


def test_violations(on_90: Resources) -> None:
    what = specialisation(product())
    for arch, limit in ARCHITECTURES.items():
        assert violations(what, arch, replace(on_90, shared_bytes=limit)) == []
        (line,) = violations(what, arch, replace(on_90, shared_bytes=limit + 1))
        assert f"on sm_{arch}: needs {limit + 1} bytes of shared memory of {limit}" in line
    large = replace(what, warps=16)
    assert violations(large, 80, replace(on_90, registers=128)) == []
    (line,) = violations(large, 80, replace(on_90, registers=136))
    assert "needs 136 registers in each of 512 threads" in line
    without, older = replace(on_90, mma=0, wgmma=0), replace(on_90, mma=16, wgmma=0)
    for arch in (80, 90):
        (line,) = violations(what, arch, without)
        assert "multiplies without tensor cores" in line
    assert violations(what, 80, older) == []
    (line,) = violations(what, 90, older)
    assert "multiplies without wgmma" in line
    assert violations(what, 90, replace(older, operands=frozenset({"tf32"}))) == []


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


def test_a_computed_first_operand_is_unsafe() -> None:
    """Held in registers, it is changed while wgmma may still read it; ptxas serializes some of such kernels."""
    pairs = [
        (specialisation(product(config=Config(128, 64, 64, 4, 4), relu=relu)), 90) for relu in (False, True)
    ]
    resources = [compiled(*pair) for pair in pairs]
    assert [(x.unsafe, x.serialized) for x in resources] == [(False, False), (True, True)]
    (line,) = violations(*pairs[1], resources[1])
    assert "may read registers while they change" in line
    assert {(what, 90): x for what, _, x in compile_all(pairs, is_unsafe)} == dict(
        zip(pairs, (False, True), strict=True)
    )


def test_what_does_not_compile_says_why() -> None:
    what = specialisation(wrong())
    with pytest.raises(CompileError, match=r"(?s)wrong 3 4w3s on sm_80 does not compile: .*power of 2"):
        compiled(what, 80)


def test_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = [product(), scale(), product()]

    def launches(arch: str, batch: int, dtype: str, capability: int) -> list[Launch]:
        if arch != "toy":
            raise ValueError(f"unknown arch {arch!r}")
        return given

    monkeypatch.setattr(kernel_resources, "launches", launches)
    assert main(["--json", "--model", "toy", "--arch", "90", "80", "--dtype", "bf16"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(x["kernel"], x["arch"]) for x in rows] == [
        ("product", "sm_90"), ("scale", "sm_90"), ("product", "sm_80"), ("scale", "sm_80")
    ]  # fmt: skip
    assert rows[0]["config"] == "64x64x32 4w3s" and rows[0]["details"] == "*bf16; PRECISION=tf32 RELU=False"
    assert rows[0]["mma"] > 0 and rows[3]["mma"] is None
    given[:] = [scale(**SPILLING), wrong()]
    assert main(["--model", "toy", "--arch", "90", "--dtype", "bf16"]) == 1
    captured = capsys.readouterr()
    header, row = captured.out.splitlines()
    assert header.split()[:4] == ["kernel", "arch", "config", "registers"] and row.split()[0] == "scale"
    assert "scale 16384 1w3s on sm_90: spills" in captured.err and "does not compile" in captured.err
    for arguments, message in (
        (["--arch", "75"], "choose from 80, 86, 89, 90, 100, 120"),
        (["--dtype", "int8"], "'int8'"),
        (["--model", "vgg"], "unknown arch 'vgg'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert message in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err
