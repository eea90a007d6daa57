"""What is packed of a Triton cache, and that Triton finds it in another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_bundle

FILES = {"add.cubin": b"\x7fELF", "add.json": b"{}", "add.ttir": b"text", "add.source": b"text"}
IDENTITY = {"python": "3.12", "torch": "2.11.0", "triton": "3.6.0", "kernels": "0"}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Of a cache with an entry that is wanted, an old one, and a launcher."""
    work = tmp_path / "work"
    for name in ("WANTED", "OLD"):
        folder = work / "triton" / name
        folder.mkdir(parents=True)
        for file, content in FILES.items():
            (folder / file).write_bytes(content)
        paths = {file: str(folder / file) for file in FILES}  # as Triton writes them
        (folder / "__grp__add.json").write_text(json.dumps({"child_paths": paths}))
    for name in ("triton/LAUNCHER/launcher.so", f"lib/{gpu_bundle.EXTENSION}", "python/carried.py"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).touch()
    gpu_bundle.pack(tmp_path / "bundle.tar.xz", work, ["WANTED"], {"identity": IDENTITY})
    return tmp_path / "bundle.tar.xz"


def test_a_bundle_in_another_folder(tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    for _ in range(2):  # over what is there
        assert gpu_bundle.load(bundle, root)["identity"] == IDENTITY
    cache = root / gpu.CACHE / "triton"
    assert sorted(str(path.relative_to(cache)) for path in cache.glob("*/*")) == [
        "LAUNCHER/launcher.so",
        "WANTED/__grp__add.json",
        "WANTED/add.cubin",
        "WANTED/add.json",
    ]
    assert (root / gpu_bundle.EXTENSION).exists()

    monkeypatch.setattr(gpu, "ROOT", root)
    variables = gpu.environment(tmp_path)
    subprocess.run([sys.executable, "-c", "import carried"], env=variables, check=True)
    triton_cache = pytest.importorskip("triton.runtime.cache")
    monkeypatch.setenv("TRITON_CACHE_DIR", variables["TRITON_CACHE_DIR"])
    group = triton_cache.FileCacheManager("WANTED").get_group("add.json")
    assert group == {name: str(cache / "WANTED" / name) for name in ("add.cubin", "add.json")}
    assert triton_cache.FileCacheManager("OLD").get_group("add.json") is None


def test_a_machine_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_bundle.identity().keys() == IDENTITY.keys()
    monkeypatch.setattr(gpu_bundle, "identity", lambda: IDENTITY | {"triton": "3.7.1"})
    assert gpu_bundle.differences({"identity": IDENTITY}) == ["triton 3.7.1, bundle 3.6.0"]


COMPILED = """
import sys
from pathlib import Path
from benchmarks import gpu_bundle
if __name__ == "__main__":
    kernels = gpu_bundle.candidates([("resnet18", 64)])
    chosen = next(kernel for kernel in kernels if "sum_splits" in kernel.function)
    entries, refused = gpu_bundle.compile_kernels(Path(sys.argv[1]), [chosen])
    gpu_bundle.os.environ["TRITON_CACHE_DIR"] = sys.argv[1]
    kernel = gpu_bundle.warm_up(kernels[chosen], gpu_bundle.ARCH)
    print(len(kernels), *entries, refused, Path(next(iter(kernel.metadata_group.values()))).parent.name)
"""


def test_a_launch_finds_what_was_compiled(tmp_path: Path) -> None:
    """Under the same name in Triton's cache. Launchers, which the oldest Triton compiles too, are left out."""
    pytest.importorskip("triton")
    script = tmp_path / "script.py"
    script.write_text(
        COMPILED.replace("if __name__", "gpu_bundle.make_launcher = lambda kernel: None\nif __name__")
    )
    command = [sys.executable, script, tmp_path / "cache"]
    variables = os.environ | {"PYTHONPATH": str(gpu.ROOT)}
    count, entry, refused, launched = subprocess.check_output(command, env=variables, text=True).split()
    assert int(count) > 100 and refused == "0" and entry == launched


def test_what_tuning_may_try_is_in_it() -> None:
    """Several configurations of each launch, and those that run without tuning."""
    pytest.importorskip("triton")
    from resnet_fused import plan

    launched = {(x.name, str(x.config)) for x in plan.launches("resnet18", 64, "bf16")}
    tried = {(x.name, str(x.config)) for x in plan.candidates("resnet18", 64, "bf16")}
    assert len(tried) > 2 * len(launched) and launched <= tried
