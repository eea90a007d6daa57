"""What is packed of a Triton cache, and that Triton finds it in another folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, gpu_bundle

FILES = {"add.cubin": b"\x7fELF", "add.json": b"{}", "add.ttir": b"text", "add.source": b"text"}


def entry(folder: Path) -> None:
    """As Triton writes one, with absolute paths."""
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    paths = {name: str(folder / name) for name in FILES}
    (folder / "__grp__add.json").write_text(json.dumps({"child_paths": paths}))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Of a cache with an entry that is wanted, an old one, and a launcher."""
    cache, extension = tmp_path / "made", tmp_path / "_C.so"
    for name in ("WANTED", "OLD"):
        entry(cache / name)
    (cache / "LAUNCHER").mkdir()
    (cache / "LAUNCHER" / "__triton_launcher.so").write_bytes(b"launcher")
    extension.write_bytes(b"extension")
    file = tmp_path / "bundle.tar.xz"
    gpu_bundle.pack(
        file, cache, ["WANTED"], {gpu_bundle.EXTENSION: extension}, {"identity": {"python": "3.12"}}
    )
    return file


def test_a_bundle_in_another_folder(tmp_path: Path, bundle: Path) -> None:
    cache, root = tmp_path / "cache", tmp_path / "root"
    for _ in range(2):  # over what is there
        assert gpu_bundle.extract(bundle, cache, root) == {"identity": {"python": "3.12"}}
    assert sorted(str(path.relative_to(cache)) for path in cache.glob("*/*")) == [
        "LAUNCHER/__triton_launcher.so",
        "WANTED/__grp__add.json",
        "WANTED/add.cubin",
        "WANTED/add.json",
    ]
    group = json.loads((cache / "WANTED" / "__grp__add.json").read_text())["child_paths"]
    assert group == {name: str(cache / "WANTED" / name) for name in ("add.cubin", "add.json")}
    assert Path(group["add.cubin"]).read_bytes() == FILES["add.cubin"]
    assert (root / gpu_bundle.EXTENSION).read_bytes() == b"extension"


def test_stages_import_what_was_carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    module, file = f"{gpu.TOOLS_FOLDER}/carried.py", tmp_path / "bundle.tar.xz"
    (tmp_path / "here.py").touch()
    gpu_bundle.pack(file, tmp_path / "no cache", [], {module: tmp_path / "here.py"}, {})
    gpu_bundle.extract(file, tmp_path / "cache", tmp_path)
    subprocess.run([sys.executable, "-c", "import carried"], env=gpu.environment(), check=True)


def test_triton_reads_it(tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = pytest.importorskip("triton.runtime.cache")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    gpu_bundle.extract(bundle, tmp_path / "cache", tmp_path / "root")
    group = cache.FileCacheManager("WANTED").get_group("add.json")
    assert group == {name: str(tmp_path / "cache" / "WANTED" / name) for name in ("add.cubin", "add.json")}
    assert cache.FileCacheManager("OLD").get_group("add.json") is None


def test_a_machine_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"python": "3.12", "triton": "3.6.0"}
    monkeypatch.setattr(gpu_bundle, "identity", lambda: here)
    assert gpu_bundle.differences({"identity": dict(here)}) == []
    other: dict[str, Any] = {"identity": {"python": "3.12", "triton": "3.7.1"}}
    assert gpu_bundle.differences(other) == ["triton 3.6.0, bundle 3.7.1"]
    assert len(gpu_bundle.differences({})) == 2


def test_what_tuning_may_try_is_in_it() -> None:
    """Several configurations of each launch, and those that run without tuning."""
    pytest.importorskip("triton")
    from resnet_fused import plan
    from resnet_fused.kernels.autotune import measurement

    launched = plan.launches("resnet18", 64, "bf16")
    tried = gpu_bundle.candidates([("resnet18", 64)])
    configs = {launch.name: set[str]() for launch in launched}
    for launch in tried:
        configs[launch.name].add(str(launch.config))
    assert len(tried) > 2 * len(launched)
    assert all(
        len(configs[name]) >= measurement.MAX_CONFIGS
        for name in ("conv_bn_stats", "dgrad", "wgrad", "conv1x1_bn_add_relu")
    )
    assert {(x.name, str(x.config), x.grid) for x in launched} <= {
        (x.name, str(x.config), x.grid) for x in tried
    }
