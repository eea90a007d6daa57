"""Other projects' trainers

They train a fused model as they train a plain one: one line of the user's code changes.

Two steps in float64, where rounding flips no ReLU, with torchvision's ResNet converted by ``fuse`` and with a model of
this package, each beside the plain model. timm, torchvision and accelerate are in the `dev` extra; the tests of the
others are skipped where they are not installed. Tried last with torch 2.13: lightning 2.6.6, accelerate 1.15.0,
transformers 5.24.0, fastai 2.8.12, timm 1.0.31, torchvision 0.28.0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import resnet_fused
import tests.torchvision_ops  # noqa: F401
from resnet_fused import ops, reference
from tests.published_weights import publish

torchvision = pytest.importorskip("torchvision")
CLASSES, STEPS, BATCH = 5, 2, 4
BLOCKS = 8  # of a resnet18
LEARNING_RATE = 0.05
State = dict[str, Tensor]
Train = Callable[[nn.Module], nn.Module]  # trains a model; returns it, or what a user evaluates instead


def data() -> TensorDataset:
    """Eight images and labels, always the same."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(STEPS * BATCH, 3, 32, 32, dtype=torch.float64, generator=generator)
    return TensorDataset(images, torch.arange(len(images)) % CLASSES)


def batches() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(data(), batch_size=BATCH)


def fused_torchvision() -> nn.Module:
    model: nn.Module = torchvision.models.resnet18(num_classes=CLASSES)
    return resnet_fused.fuse(model)


def own() -> nn.Module:
    return resnet_fused.resnet18(num_classes=CLASSES)


def fused_timm() -> nn.Module:
    timm = pytest.importorskip("timm")
    model: nn.Module = timm.create_model("resnet18d", num_classes=CLASSES)
    return resnet_fused.fuse(model)


both = pytest.mark.parametrize("make", [fused_torchvision, own])


def state_of(model: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@contextmanager
def counted_blocks() -> Iterator[list[bool]]:
    """For each block that runs as one fused op, whether it is in training."""
    whole, calls = ops.residual_block, []

    def counting(x: Tensor, convs: Any, *rest: Any) -> Any:
        calls.append(torch.is_grad_enabled() and convs[0].bn.training)
        return whole(x, convs, *rest)

    with mock.patch.object(ops, "residual_block", counting):
        yield calls


def check(make: Callable[[], nn.Module], train: Train) -> None:
    """Trains a fused model and its plain copy, and compares what they became."""
    torch.manual_seed(3)
    fused = make().to(torch.float64, memory_format=torch.channels_last)  # type: ignore[call-overload]
    plain = resnet_fused.unfuse(copy.deepcopy(fused))
    before, kinds = state_of(fused), [type(module) for module in fused.modules()]
    with counted_blocks() as calls:
        trained = train(fused)
    assert calls.count(True) == STEPS * BLOCKS
    assert [type(module) for module in fused.modules()] == kinds
    with counted_blocks() as calls:
        expected = train(plain)
    assert not calls
    after = state_of(fused)
    unchanged = [name for name, value in before.items() if torch.equal(value, after[name])]
    assert not unchanged
    for ours, theirs in ((fused, plain), (trained, expected)):
        found = state_of(ours)
        for name, value in state_of(theirs).items():
            torch.testing.assert_close(found.pop(name), value, rtol=1e-7, atol=1e-9)
        assert not found


@both
def test_lightning(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Lightning, in double precision, with a checkpoint that the plain model can load"""
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            images, labels = batch
            return F.cross_entropy(self.model(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE, momentum=0.9)

    def train(model: nn.Module) -> nn.Module:
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            precision="64-true",
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(Classifier(model), batches())
        assert trainer.global_step == STEPS
        trainer.save_checkpoint(tmp_path / "model.ckpt")
        loaded: nn.Module = resnet_fused.unfuse(copy.deepcopy(model))
        state = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
        Classifier(loaded).load_state_dict(state)
        return loaded

    check(make, train)


@both
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(make: Callable[[], nn.Module], precision: str) -> None:
    """accelerate

    Autocast replaces the forward of the whole model; its blocks stay fused.
    """
    accelerate = pytest.importorskip("accelerate")

    def train(model: nn.Module) -> nn.Module:
        accelerate.state.AcceleratorState._reset_state(
            reset_partial_state=True
        )  # else one precision a process
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, batches())
        prepared.train()
        dtype = model.get_parameter("fc.weight").dtype
        for images, labels in loader:
            with accelerator.accumulate(prepared):
                loss = F.cross_entropy(prepared(images.to(dtype)), labels)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            assert loss.isfinite()
        unwrapped: nn.Module = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert unwrapped is model
        return unwrapped

    if precision == "no":
        check(make, train)
    else:
        with counted_blocks() as calls:
            train(make().float().to(memory_format=torch.channels_last))  # type: ignore[call-overload]
        assert calls.count(True) == STEPS * BLOCKS


@both
def test_transformers(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """transformers' Trainer, with a module around the model that returns a loss"""
    transformers = pytest.importorskip("transformers")

    class Classifier(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.model(images)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def train(model: nn.Module) -> nn.Module:
        options = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=1,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-3,
            optim="sgd",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        rows = [{"images": images, "labels": label} for images, label in zip(*data().tensors, strict=True)]
        trainer = transformers.Trainer(Classifier(model), options, train_dataset=rows)
        assert trainer.train().global_step == STEPS
        return model

    check(make, train)


def test_timm() -> None:
    """What timm's train.py is made of: optimizers, schedule, loss, scaler, gradient clipping and moving average"""
    pytest.importorskip("timm")
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3, NativeScaler

    def train(model: nn.Module) -> nn.Module:
        optimizer = create_optimizer_v2(
            model, opt="sgd", lr=LEARNING_RATE, weight_decay=1e-4, filter_bias_and_bn=True
        )
        schedule, _ = create_scheduler_v2(optimizer, num_epochs=2, updates_per_epoch=STEPS)
        ema = ModelEmaV3(model, decay=0.9)
        scaler, loss_of = NativeScaler(device="cpu"), LabelSmoothingCrossEntropy(0.1)
        model.train()
        for step, (images, labels) in enumerate(batches(), 1):
            optimizer.zero_grad()
            loss = loss_of(model(images), labels)
            scaler(loss, optimizer, clip_grad=0.1, clip_mode="agc", parameters=model.parameters())
            ema.update(model, step=step)
            schedule.step_update(step)
        smoothed: nn.Module = ema.module
        smoothed.eval()(images)
        return smoothed

    check(fused_timm, train)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Parameters of norms, which are found by their class, without weight decay."""
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in model.modules():
        to = others if isinstance(module, norms) else decayed
        to += module.parameters(recurse=False)
    return [{"params": decayed, "weight_decay": 1e-4}, {"params": others, "weight_decay": 0.0}]


@both
def test_torchvision(make: Callable[[], nn.Module]) -> None:
    """What torchvision's reference trainer is made of: groups by class, warm-up, a moving average of buffers too"""

    def train(model: nn.Module) -> nn.Module:
        groups = groups_of(model)
        assert [len(group["params"]) for group in groups] == [20 + 2, 2 * 20]
        optimizer = torch.optim.SGD(groups, lr=LEARNING_RATE, momentum=0.9, nesterov=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=STEPS)
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        loss_of = nn.CrossEntropyLoss(label_smoothing=0.1)
        model.train()
        for images, labels in batches():
            loss = loss_of(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            ema.update_parameters(model)
        ema.eval()(images)
        smoothed: nn.Module = ema.module
        return smoothed

    check(make, train)


@both
def test_torchvision_frozen_norms(make: Callable[[], nn.Module]) -> None:
    """FrozenBatchNorm2d in place of every norm, as torchvision's detection trainers have it in the backbone"""
    from torchvision.ops.misc import FrozenBatchNorm2d

    torch.manual_seed(3)
    fused = make().to(torch.float64, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name, module in [*fused.named_modules()]:
        if isinstance(module, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(module.num_features).double()
            fused.get_submodule(name.rpartition(".")[0]).set_submodule(name.rpartition(".")[2], frozen)
    plain = resnet_fused.unfuse(copy.deepcopy(fused))
    images, labels = next(iter(batches()))
    with counted_blocks() as calls:
        F.cross_entropy(fused(images), labels).backward()
    assert len(calls) == BLOCKS
    F.cross_entropy(plain(images), labels).backward()
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None, name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-9)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of two classes, as fastai takes them."""
    from PIL import Image

    for label, name in enumerate(("bright", "dark")):
        for part, count in (("train", 4), ("valid", 1)):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                colour = (200 - 120 * label, 20 * index, 90)
                Image.new("RGB", (32, 32), colour).save(tmp_path / part / name / f"{index}.png")
    return tmp_path


def fastai_steps(
    folder: Path, arch: Callable[..., nn.Module], change: Callable[[nn.Module], object], **options: Any
) -> Any:
    """A learner after two steps of SGD in float64."""
    vision = pytest.importorskip("fastai.vision.all")

    class Double(vision.Callback):  # type: ignore[name-defined]
        def before_batch(self) -> None:
            self.learn.xb = tuple(x.double() for x in self.xb)

    vision.set_seed(5)  # before the loaders are made, which draw from its generators
    loaders = vision.ImageDataLoaders.from_folder(folder, bs=BATCH, seed=0, num_workers=0, device="cpu")
    options = {"pretrained": False, "normalize": False, "opt_func": vision.SGD, "ps": 0.0} | options
    learner = vision.vision_learner(loaders, arch, cbs=[Double()], **options)
    learner.model.to(torch.float64, memory_format=torch.channels_last)
    change(learner.model)
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, lr=1e-3)
    return learner


@both
def test_fastai(make: Callable[[], nn.Module], folder: Path) -> None:
    """fastai's vision_learner, which cuts the model before the last pooling and puts a head on the rest"""
    arch = {own: resnet_fused.resnet18, fused_torchvision: torchvision.models.resnet18}[make]
    plain = {own: reference.resnet18, fused_torchvision: torchvision.models.resnet18}[make]
    with counted_blocks() as calls:
        ours = fastai_steps(folder, arch, resnet_fused.fuse)
    assert calls.count(True) == STEPS * BLOCKS
    assert len(ours.model[0]) == 8 and isinstance(ours.model[0][3], nn.MaxPool2d)
    with counted_blocks() as calls:
        theirs = fastai_steps(folder, plain, lambda model: None)
    assert not calls
    found = state_of(ours.model)
    for name, value in state_of(theirs.model).items():
        torch.testing.assert_close(found.pop(name), value, rtol=1e-7, atol=1e-9)
    assert not found


@pytest.mark.parametrize("registered", [False, True], ids=["pretrained", "weights"])
def test_fastai_starts_from_published_weights(
    registered: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fastai's vision_learner from published weights

    By ``pretrained=True``; by name, in three groups, where its table has the constructor beside torchvision's.
    """
    learners = pytest.importorskip("fastai.vision.learner")
    state = reference.resnet18().state_dict()
    publish({"IMAGENET1K_V1": state}, tmp_path, monkeypatch)
    if registered:
        of_torchvision = learners.model_meta[torchvision.models.resnet18]
        monkeypatch.setitem(learners.model_meta, resnet_fused.resnet18, of_torchvision)
    begun: dict[str, Tensor] = {}
    learner = fastai_steps(
        folder, resnet_fused.resnet18, lambda model: begun.update(state_of(model)), pretrained=True
    )
    loaded = {name: value for name, value in begun.items() if name.startswith("0.")}
    body = [value for name, value in state.items() if not name.startswith("fc")]
    for ours, theirs in zip(loaded.values(), body, strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))
    assert len(learner.opt.param_lists) == (3 if registered else 2)
    weight = learner.model[0][4][0].conv1.weight
    assert not weight.requires_grad and torch.equal(weight, begun["0.4.0.conv1.weight"])
