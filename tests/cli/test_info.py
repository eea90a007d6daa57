"""`python -m resnet_fused info`, and what starting the program loads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import resnet_fused
from resnet_fused import native
from resnet_fused.cli.main import main
from tests.cli.conftest import Cli


def test_info(cli: Cli) -> None:
    result = cli("info")
    assert result.code == 0 and not result.err
    rows = {line.split("  ")[0]: line for line in result.out.splitlines()}
    assert rows["resnet_fused"].endswith(resnet_fused.__version__)
    assert rows["torch"].endswith(torch.__version__)
    assert rows["CPU threads"].endswith(str(torch.get_num_threads()))
    assert "triton" in rows and "CUDA of torch" in rows
    for op in ("bn_relu", "bn_add_relu", "bn_bn_add_relu", "bn_relu_maxpool", "batch_norm_stats"):
        assert "cpu" in rows[op] and ("native" in rows[op] or "reference" in rows[op])


def test_info_says_why_native_is_missing(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "is_loaded", False)
    monkeypatch.setattr(native, "missing_reason", "the cellar is shut")
    lines = cli("info").out.splitlines()
    assert any(
        line.startswith("bn_relu ") and "reference" in line and "the cellar is shut" in line for line in lines
    )


def test_plan_of_a_step(cli: Cli) -> None:
    result = cli("info", "--plan", "resnet50", "--batch", "256")
    assert result.code == 0 and "resnet50, batch 256, 224x224, bf16" in result.out
    assert "passes over activations:" in result.out and "folded_dgrad" in result.out


@pytest.mark.parametrize(
    ("arguments", "option"),
    [((), "train"), (("train",), "--no-channels-last"), (("bench",), "--no-compile"), (("info",), "--plan")],
)
def test_help(arguments: tuple[str, ...], option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--help"])
    assert left.value.code == 0 and option in capsys.readouterr().out


def test_the_library_and_info_need_no_optional_package() -> None:
    optional = ("sklearn", "matplotlib", "tqdm", "PIL", "scipy")
    program = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"  # torch takes tqdm where it is installed
        "import resnet_fused\n"
        f"assert not [m for m in {optional} if m in set(sys.modules) - before]\n"
        "assert 'resnet_fused.cli' not in sys.modules\n"
        f"sys.modules.update(dict.fromkeys({(*optional, 'numpy')}))\n"
        "from resnet_fused.cli.main import main\n"
        "raise SystemExit(main(['info']))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
