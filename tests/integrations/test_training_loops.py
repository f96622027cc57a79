"""Loops of timm, Lightning and Accelerate, and adapters of PEFT, around a converted network."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import condconv_surgery as cs
from condconv_surgery.layers import conditional_layers
from tests.integrations.fresh_process import require_equal_elsewhere, require_moved

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 4
CHOSEN = ["layer1.*", "layer4.*"]


def converted_resnet(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    plain = torchvision.models.resnet18(num_classes=4)
    return cs.convert(plain, cs.CondConv(experts=2), example=IMAGES[:2], include=CHOSEN, **options).model


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight.detach().clone() for name, layer in conditional_layers(model).items()}


def test_the_loop_of_timm(tmp_path: Path) -> None:
    """As its train.py: grouped parameters, schedule, averaged weights, checkpoints, resume."""
    timm = pytest.importorskip("timm")
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import CheckpointSaver, ModelEmaV3

    torch.manual_seed(0)
    plain = timm.create_model("resnet18", num_classes=4)
    model = cs.convert(plain, cs.CondConv(experts=2), example=IMAGES[:2], include=CHOSEN).model.train()
    options = {"opt": "adamw", "lr": 1e-2, "weight_decay": 0.05, "layer_decay": 0.9}
    optimizer = create_optimizer_v2(model, **options)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    scheduler, average = CosineLRScheduler(optimizer, t_initial=2), ModelEmaV3(model, decay=0.5)
    saver = CheckpointSaver(model, optimizer, model_ema=average, checkpoint_dir=f"{tmp_path}", decreasing=True)
    before = weights_of(model)
    for epoch in range(2):
        loss = cross_entropy(model(IMAGES), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model, step=epoch + 1)
        scheduler.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=loss.item())
    require_moved(before, model)
    require_moved(before, average.module)

    twin = cs.convert(plain, cs.CondConv(experts=2), example=IMAGES[:2], include=CHOSEN).model
    timm.models.resume_checkpoint(twin, f"{tmp_path}/last.pth.tar", create_optimizer_v2(twin, **options))
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    require_equal_elsewhere(average.module, IMAGES, tmp_path)


def test_a_lightning_module(tmp_path: Path) -> None:
    """Its own network is converted inside it; the module's checkpoint goes into a module converted alike."""
    lightning = pytest.importorskip("lightning.pytorch")

    class Classifier(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = torchvision.models.resnet18(num_classes=4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(x)
            return y

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    include = [f"net.{name}" for name in CHOSEN]
    torch.manual_seed(0)
    module = cs.convert(Classifier(), cs.CondConv(experts=2), example=IMAGES[:2], include=include).model
    before = weights_of(module)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_steps=1, default_root_dir=tmp_path, **quiet)
    trainer.fit(module.train(), DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8))
    require_moved(before, module)
    trainer.save_checkpoint(tmp_path / "module.ckpt", weights_only=True)
    twin = cs.convert(Classifier(), cs.CondConv(experts=2), example=IMAGES[:2], include=include).model
    twin.load_state_dict(torch.load(tmp_path / "module.ckpt")["state_dict"])
    assert torch.equal(twin.eval()(IMAGES), module.eval()(IMAGES))
    require_equal_elsewhere(module.net, IMAGES, tmp_path)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    model = converted_resnet().train()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    before = weights_of(model)
    for images, labels in loader:
        accelerator.backward(cross_entropy(wrapped(images), labels))
        optimizer.step()
    require_moved(before, model)
    accelerator.save_state(f"{tmp_path}/state")
    trained = weights_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(f"{tmp_path}/state")
    assert all(torch.equal(trained[name], weight) for name, weight in weights_of(model).items())
    unwrapped = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    require_equal_elsewhere(unwrapped, IMAGES, tmp_path)


def test_layers_inside_adapters_of_peft_are_skipped_until_merged() -> None:
    peft = pytest.importorskip("peft")

    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["layer4.0.conv1", "layer4.1.conv2"], modules_to_save=["fc"], r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(torchvision.models.resnet18(num_classes=4), config)
    conversion = cs.convert(adapted, cs.CondConv(experts=2), example=IMAGES[:2])
    inside = [skip.name for skip in conversion.plan.skipped if skip.reason.startswith("inside a PEFT adapter (Conv2d)")]
    assert len(inside) == 6  # base layer, A and B of each
    assert all("conv1." in name or "conv2." in name for name in inside)
    assert len(conversion.plan.to_convert) == 17
    merged = adapted.merge_and_unload()
    assert len(cs.convert(merged, cs.CondConv(experts=2), example=IMAGES[:2]).plan.to_convert) == 19
