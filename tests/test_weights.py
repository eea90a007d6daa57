"""``weights`` of the constructors: torchvision's names and enums, files of the user's, and what cannot be loaded."""

from __future__ import annotations

import enum
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import reference, weights
from tests import torchvision_ops  # noqa: F401  # before torchvision
from tests.published_weights import publish

import torchvision  # isort: skip

State = dict[str, Tensor]
both_libraries = pytest.mark.parametrize("library", [resnet_fused, reference], ids=["fused", "reference"])


def random_state(num_classes: int = 1000, seed: int = 1) -> State:
    """Of a resnet18, with running statistics that no fresh model has."""
    torch.manual_seed(seed)
    state = reference.resnet18(num_classes=num_classes).state_dict()
    for name, value in state.items():
        if "running" in name:
            value.uniform_(0.5, 2)
        elif "tracked" in name:
            value.fill_(seed)
    return state


def assert_loaded(model: nn.Module, state: State) -> None:
    own = model.state_dict()
    assert own.keys() == state.keys()
    for name, value in own.items():
        assert torch.equal(value, state[name]), name


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, State]:
    """resnet18 has two versions, at URLs of files in tmp_path; torch.hub's folder is empty. Their states."""
    versions = enumerate(("IMAGENET1K_V1", "IMAGENET1K_V2"), 1)
    states = {version: random_state(seed=seed) for seed, version in versions}
    publish(states, tmp_path, monkeypatch)
    return states


def cache(tmp_path: Path) -> Path:
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.mark.parametrize("arch", reference.ARCHITECTURES)
def test_the_table_is_torchvisions(arch: str) -> None:
    theirs = torchvision.models.get_model_weights(arch)
    ours = weights.PUBLISHED[arch]
    assert ours.enum == theirs.__name__
    assert {name: weights.URL + file for name, file in ours.files.items()} == {w.name: w.url for w in theirs}
    assert weights.names(arch) == list(theirs.__members__)[: len(theirs)]
    for given in ("DEFAULT", f"{ours.enum}.DEFAULT", theirs.DEFAULT):
        assert weights.find(arch, given) == weights.Source(url=theirs.DEFAULT.url)
    for member in theirs:
        assert len(member.meta["categories"]) == weights.CLASSES
        for given in (member, member.name, str(member)):
            assert weights.find(arch, given).url == member.url


@both_libraries
@pytest.mark.parametrize(
    ("given", "version"),
    [
        ("DEFAULT", 2),
        ("IMAGENET1K_V1", 1),
        ("IMAGENET1K_V2", 2),
        ("ResNet18_Weights.DEFAULT", 2),
        ("ResNet18_Weights.IMAGENET1K_V1", 1),
    ],
)
def test_names(given: str, version: int, library: Any, files: dict[str, State]) -> None:
    model = library.resnet18(weights=given, progress=False)
    assert_loaded(model, files[f"IMAGENET1K_V{version}"])
    assert model.training and type(model) is library.ResNet
    assert all(p.is_contiguous() and p.requires_grad for p in model.parameters())


@both_libraries
def test_a_member_of_torchvisions_enum(library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its URL counts, whatever our table holds."""
    member = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delitem(weights.PUBLISHED["resnet18"].files, member.name)
    cache(tmp_path).mkdir(parents=True)
    state = random_state()
    torch.save(state, cache(tmp_path) / os.path.basename(member.url))
    assert_loaded(library.resnet18(weights=member), state)
    expected = r"expected a member of ResNet34_Weights, got one of ResNet18_Weights"
    with pytest.raises(TypeError, match=expected):
        library.resnet34(weights=member)


@both_libraries
def test_pretrained(library: Any, files: dict[str, State]) -> None:
    """By name and by position; torchvision's old argument is the first version."""
    with pytest.warns(UserWarning, match=r"'pretrained' is deprecated.*weights='IMAGENET1K_V1'"):
        assert_loaded(library.resnet18(pretrained=True), files["IMAGENET1K_V1"])
    with warnings.catch_warnings(record=True) as warned:
        assert_loaded(library.resnet18(True, False), files["IMAGENET1K_V1"])
    assert [str(warning.message).split(": ")[1].split(" is ")[0] for warning in warned] == [
        "give 'weights' by name, not by position",
        "give 'progress' by name, not by position",
        "the parameter 'pretrained'",
    ]
    assert {Path(warning.filename) for warning in warned} == {Path(__file__)}


def test_downloaded_once(files: dict[str, State], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for progress in (False, True):
        resnet_fused.resnet18(weights="IMAGENET1K_V1", progress=progress)
        printed = capfd.readouterr()
        assert ("Downloading" in printed.out) == (not progress) and "%" not in printed.err
    assert [path.name for path in cache(tmp_path).iterdir()] == [
        weights.PUBLISHED["resnet18"].files["IMAGENET1K_V1"]
    ]
    resnet_fused.resnet18(weights="IMAGENET1K_V2", progress=True)
    assert "100%" in capfd.readouterr().err


def test_a_download_with_another_hash_is_refused(files: dict[str, State], tmp_path: Path) -> None:
    name = weights.PUBLISHED["resnet18"].files["IMAGENET1K_V1"]
    with open(tmp_path / "served" / name, "ab") as file:
        file.write(b"more")
    with pytest.raises(RuntimeError, match="invalid hash value"):
        resnet_fused.resnet18(weights="IMAGENET1K_V1", progress=False)
    assert not list(cache(tmp_path).iterdir())


def test_offline(files: dict[str, State], tmp_path: Path) -> None:
    """The message alone is enough to put it right."""
    name = weights.PUBLISHED["resnet18"].files["IMAGENET1K_V1"]
    held = (tmp_path / "served" / name).rename(tmp_path / "held")
    with pytest.raises(ConnectionError) as caught:
        resnet_fused.resnet18(weights="IMAGENET1K_V1")
    message = str(caught.value)
    url, file = f"{weights.URL}{name}", cache(tmp_path) / name
    assert (
        f"cannot download {url} (" in message
        and message.endswith(f" save it as {file}")
        and "\n" not in message
    )
    held.rename(file)
    assert_loaded(resnet_fused.resnet18(weights="IMAGENET1K_V1"), files["IMAGENET1K_V1"])


@both_libraries
def test_num_classes_of_named_weights(library: Any, files: dict[str, State], tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        library.resnet18(weights="DEFAULT", num_classes=10)
    member = torchvision.models.ResNet18_Weights.DEFAULT
    with pytest.raises(ValueError) as theirs:
        torchvision.models.resnet18(weights=member, num_classes=10)
    with pytest.raises(ValueError) as ours:
        library.resnet18(weights=member, num_classes=10)
    assert str(caught.value) == str(ours.value) == str(theirs.value)
    assert not cache(tmp_path).exists()
    assert library.resnet18(weights="DEFAULT", num_classes=1000).fc.out_features == 1000


def with_prefix(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


CONTENTS = {
    "a state_dict": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "model": lambda state: {
        "model": state,
        "optimizer": {"state": {}, "param_groups": []},
        "arch": "resnet18",
    },
    "DistributedDataParallel": lambda state: {"state_dict": with_prefix("module.", state)},
    "torch.compile": lambda state: with_prefix("_orig_mod.", state),
    "compiled DDP": lambda state: with_prefix("_orig_mod.module.", state),
    "DDP of compiled": lambda state: with_prefix("module._orig_mod.", state),
}


@both_libraries
@pytest.mark.parametrize("content", CONTENTS)
def test_files(content: str, library: Any, tmp_path: Path) -> None:
    state, path = random_state(num_classes=3), tmp_path / "file"
    torch.save(CONTENTS[content](state), path)
    assert_loaded(library.resnet18(weights=path, num_classes=3), state)
    assert_loaded(library.resnet18(weights=str(path), num_classes=3), state)


def test_paths_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is a name also where a file has it; a path that is misspelt is said to be missing."""
    monkeypatch.chdir(tmp_path)
    for name in ("DEFAULT", "mine"):
        torch.save(random_state(), name)
    assert weights.find("resnet18", "DEFAULT").url is not None
    for path in ("mine", "./DEFAULT", "missing.pth", "missing.pt", "no/such/file", Path("DEFAULT")):
        assert weights.find("resnet18", path) == weights.Source(path=str(path))
    with pytest.raises(FileNotFoundError, match=r"missing\.pth"):
        resnet_fused.resnet18(weights="missing.pth")
    for name in ("ours", "ResNet34_Weights.DEFAULT", "IMAGENET1K_V3", ""):
        with pytest.raises(
            ValueError, match=f"resnet18 has no weights '{name}': use DEFAULT, IMAGENET1K_V1 or"
        ):
            resnet_fused.resnet18(weights=name)
    for value in (3, b"mine", random_state(), enum.Enum("Weights", ["DEFAULT"])(1)):
        with pytest.raises(TypeError, match=r"expected a.* ResNet18_Weights"):
            resnet_fused.resnet18(weights=value)  # type: ignore[arg-type]


def test_the_dtype_is_the_models(tmp_path: Path) -> None:
    state = random_state()
    torch.save(
        {name: x.half() if x.is_floating_point() else x for name, x in state.items()}, tmp_path / "half.pt"
    )
    model = resnet_fused.resnet18(weights=tmp_path / "half.pt")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.conv1.weight, state["conv1.weight"].half().float())


def test_a_file_from_before_zip(tmp_path: Path) -> None:
    """torch.load cannot map it into memory."""
    state = random_state()
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_loaded(resnet_fused.resnet18(weights=tmp_path / "old.pth"), state)


def test_the_model_does_not_hold_the_file(tmp_path: Path) -> None:
    """Weights are copied: a file that is replaced later changes nothing."""
    path, state = tmp_path / "file.pt", random_state()
    torch.save(state, path)
    model = resnet_fused.resnet18(weights=path)
    path.write_bytes(bytes(path.stat().st_size))
    assert_loaded(model, state)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save(random_state(num_classes=3), path)
    with pytest.raises(RuntimeError, match=r"size mismatch for fc\.weight"):
        resnet_fused.resnet18(weights=path)
    with pytest.raises(RuntimeError, match="Missing key"):
        resnet_fused.resnet50(weights=path, num_classes=3)
    state = random_state()
    del state["bn1.num_batches_tracked"]
    torch.save(state, path)
    with pytest.raises(RuntimeError, match=r"Missing key.*bn1\.num_batches_tracked"):
        resnet_fused.resnet18(weights=path)
    for content in ([1, 2], {1: 2}):
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"holds no state_dict but a {type(content).__name__}"):
            resnet_fused.resnet18(weights=path)
    with pytest.raises(ValueError, match=r"safetensors\.torch\.load_file"):
        resnet_fused.resnet18(weights=path.rename(tmp_path / "file.safetensors"))


def test_a_file_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model": reference.resnet18()}, tmp_path / "whole.pt")
    with pytest.raises(Exception, match="weights_only"):
        resnet_fused.resnet18(weights=tmp_path / "whole.pt")


def test_without_torchvision(files: dict[str, State], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert_loaded(resnet_fused.resnet18(weights="DEFAULT"), files["IMAGENET1K_V2"])


def test_models_by_name(files: dict[str, State]) -> None:
    listed = resnet_fused.list_models()
    assert listed == sorted(reference.ARCHITECTURES)
    assert listed == [name for name in torchvision.models.list_models() if name in listed]
    with torch.device("meta"):
        for name in listed:
            made = resnet_fused.get_model(name, num_classes=3)
            assert type(made) is resnet_fused.ResNet and made.fc.out_features == 3
            assert made.state_dict().keys() == getattr(reference, name)().state_dict().keys()
    assert_loaded(
        resnet_fused.get_model("resnet18", weights="DEFAULT", progress=False), files["IMAGENET1K_V2"]
    )
    with pytest.raises(ValueError, match=r"Unknown model 'resnet19': .*resnet101, .*wide_resnet50_2"):
        resnet_fused.get_model("resnet19")
    with pytest.raises(ValueError, match="Unknown model 'resnet19'"):
        weights.names("resnet19")
