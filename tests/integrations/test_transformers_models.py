"""Models of transformers: as sources, in artifacts, in ``finetune``, ``compare`` and ``report``, in its Trainer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.layers import conditional_layers
from condconv_surgery.models.artifact.container import read_recipe
from condconv_surgery.models.sources import load_model
from condconv_surgery.recipe import InputSpec, recipe_of
from tests.docs.test_code_blocks import blocks
from tests.images import write_images
from tests.integrations.fresh_process import ROOT, require_equal_elsewhere, train

transformers = pytest.importorskip("transformers")

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SMALL = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}


def resnet(labels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=labels
    )
    model = transformers.ResNetForImageClassification(config)
    return model.eval()


def convnext() -> nn.Module:
    return transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**SMALL, num_labels=3))


def segformer() -> nn.Module:
    config = transformers.SegformerConfig(
        **SMALL, num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16, num_labels=3
    )
    return transformers.SegformerForSemanticSegmentation(config)


def upernet() -> nn.Module:
    stages = ["stage1", "stage2", "stage3", "stage4"]
    config = transformers.UperNetConfig(
        backbone_config=transformers.ConvNextConfig(**SMALL, out_features=stages),
        hidden_size=16,
        auxiliary_in_channels=16,
        auxiliary_channels=8,
        num_labels=3,
    )
    return transformers.UperNetForSemanticSegmentation(config)


def detr(**options: Any) -> nn.Module:
    small = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in DETR_PARTS.items()}
    config = transformers.DetrConfig(d_model=16, num_queries=5, num_labels=3, **small, **options)
    return transformers.DetrForObjectDetection(config).requires_grad_(True)  # it freezes its backbone


DETR_PARTS = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}


def detr_resnet() -> nn.Module:
    backbone = transformers.ResNetConfig(**SMALL, embedding_size=8, layer_type="basic", out_features=["stage4"])
    return detr(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone)


def detr_timm() -> nn.Module:
    pytest.importorskip("timm")
    model = detr(use_timm_backbone=True, use_pretrained_backbone=False, backbone="resnet18")
    for name, scale in model.named_buffers():
        if name.endswith("bn2.weight"):
            scale.fill_(1.0)  # timm starts them at 0, and DETR freezes them: no gradient would pass
    return model


def loss_of(model: nn.Module) -> Tensor:
    output = model(pixel_values=IMAGES)
    loss: Tensor = output.logits.square().mean()
    return loss


@pytest.mark.parametrize("make", [convnext, segformer, upernet, detr_resnet, detr_timm])
def test_an_artifact_loads_alone(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    conversion = cs.convert(make(), cs.CondConv(experts=2), example={"pixel_values": IMAGES})
    assert len(conversion.plan.to_convert) >= 7
    assert conversion.difference is not None
    assert conversion.difference.eval.relative < 1e-5
    train(conversion.model, loss_of)
    require_equal_elsewhere(conversion.model, {"pixel_values": IMAGES}, tmp_path)


def test_a_model_inside_another_module_is_described(tmp_path: Path) -> None:
    """Its backbone has hooks that transformers installs when it is built."""
    model = cs.convert(nn.Sequential(upernet()), cs.CondConv(experts=2), example=IMAGES).model
    require_equal_elsewhere(model, IMAGES, tmp_path, ("transformers",))


def test_the_layers_that_detr_freezes_are_noted() -> None:
    model = detr_resnet()
    model.model.freeze_backbone()
    (note,) = cs.plan(model, cs.CondConv(experts=2), example=IMAGES).notes
    assert "layers to convert are frozen" in note


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "resnet"
    resnet().save_pretrained(path)
    values = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    values |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3}
    (path / "preprocessor_config.json").write_text(json.dumps(values))
    return path


def test_a_saved_folder_is_a_source(folder: Path, tmp_path: Path) -> None:
    original = resnet()
    for text in (f"transformers:{folder}", f"{folder}"):
        model = load_model(text)
        assert torch.equal(model(IMAGES).logits, original(IMAGES).logits)
    spec = recipe_of(model).input
    assert spec == InputSpec(3, 32, 32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic", 0.8)
    converted = cs.convert(model, cs.CondConv(experts=2)).model
    require_equal_elsewhere(converted, IMAGES, tmp_path)
    recipe = read_recipe(tmp_path / "model.safetensors")
    assert recipe.source.name == "transformers:ResNetForImageClassification"
    assert str(folder) not in json.dumps(recipe.to_dict())
    assert recipe.input == spec
    assert not torch.equal(load_model(f"{folder}", weights="none")(IMAGES).logits, original(IMAGES).logits)
    assert load_model(f"transformers:{folder}", num_classes=7)(IMAGES).logits.shape == (2, 7)


def test_a_source_is_fine_tuned_reported_and_compared(folder: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", classes=4, each=10, side=32)
    cs.save(cs.convert(load_model(f"{folder}"), cs.CondConv(experts=2)).model, tmp_path / "c.safetensors")
    options = {"schedule": {"epochs": 1}, "data": {"workers": 0}}
    result = cs.finetune(tmp_path / "c.safetensors", options, data=images, output=tmp_path / "run")
    assert result.heads == {"classifier.1": 4}
    tuned = cs.load(tmp_path / "run" / "best.safetensors")
    names = {number: f"class{number}" for number in range(4)}
    assert (tuned.num_labels, tuned.config.num_labels, tuned.config.id2label) == (4, 4, names)
    assert tuned(IMAGES, labels=torch.tensor([3, 1])).loss.isfinite()
    assert cs.report(tuned, data=images).routing is not None
    arms = ["static", "condconv:2"]
    study = cs.compare(
        f"transformers:{folder}",
        arms,
        options,
        data=images,
        output=tmp_path / "study",
        seeds=1,
        rates=1,
        progress=False,
    )
    assert study.verdict


def test_what_cannot_be_loaded_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing is downloaded here(.|\n)*Try: hf download nobody/nothing"):
        load_model("transformers:nobody/nothing")
    with pytest.raises(InputError, match=r"cannot be read"):
        load_model(f"transformers:{tmp_path}")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((folder / "config.json").read_text())
    torch.save(resnet().state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"Pickled weights \(\.bin\) are not read"):
        load_model(f"{pickled}")
    model = load_model(f"{pickled}", weights=pickled / "pytorch_model.bin")  # by our own reader, which runs nothing
    assert torch.equal(model(IMAGES).logits, resnet()(IMAGES).logits)
    converted = cs.convert(model, cs.CondConv(experts=2)).model
    converted.save_pretrained(tmp_path / "converted")
    words = r"weights of a converted network(.|\n)*condconv_surgery\.save\(model(.|\n)*load_file\(\"(.*)\"\)"
    with pytest.raises(InputError, match=words) as caught:
        load_model(f"{tmp_path / 'converted'}")
    again = cs.convert(model, cs.CondConv(experts=2), prove=False).model  # as the error says
    found = re.search(words, str(caught.value))
    assert found is not None
    nn.init.zeros_(again.classifier[1].weight)
    again.load_state_dict(load_file(found[3]))
    assert torch.equal(again(IMAGES).logits, converted(IMAGES).logits)
    with pytest.raises(InputError, match=r"Unknown class of transformers 'pipeline'(.|\n)*save_pretrained"):
        load_model("transformers:pipeline", weights="none")


def test_an_artifact_fetches_nothing(tmp_path: Path) -> None:
    """A file of somebody else may name a pretrained backbone: its weights are in the file, or the file is refused."""
    source = {"use_timm_backbone": True, "use_pretrained_backbone": True, "backbone": "resnet18"}
    model = detr(**{**source, "use_pretrained_backbone": False})
    model.config.use_pretrained_backbone = True
    converted = cs.convert(model, cs.CondConv(experts=2), example=IMAGES).model
    require_equal_elsewhere(converted, IMAGES, tmp_path)  # HF_HUB_OFFLINE=1 there: a request would raise


def test_the_example_with_its_trainer(folder: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", each=8, side=32)
    cs.save(cs.convert(load_model(f"{folder}"), cs.DynamicConv(experts=2)).model, tmp_path / "converted.safetensors")
    started = conditional_layers(cs.load(tmp_path / "converted.safetensors"))
    command = [sys.executable, "-W", "ignore", f"{ROOT}/examples/with_transformers.py"]
    arguments = ["converted.safetensors", f"{images}", "tuned.safetensors", "2"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    tuned = cs.load(tmp_path / "tuned.safetensors")
    assert recipe_of(tuned).classes == ("class0", "class1", "class2")
    layers = conditional_layers(tuned)
    assert all(not torch.equal(layer.weight, started[name].weight) for name, layer in layers.items())
    assert {float(layer.router.temperature) for layer in layers.values()} == {1.0}


def test_its_trainer_resumes_a_converted_model(tmp_path: Path) -> None:
    """Checkpoints of the Trainer hold experts and routers; a run that was interrupted ends with the same weights."""

    class Items(torch.utils.data.Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> dict[str, Any]:
            generator = torch.Generator().manual_seed(index)
            return {"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": index % 3}

    def trainer() -> Any:
        model = cs.convert(resnet(), cs.CondConv(experts=2), example=IMAGES[..., :32, :32]).model
        options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True}
        return transformers.Trainer(
            model, transformers.TrainingArguments(f"{tmp_path}", report_to=[], **options), train_dataset=Items()
        )

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    ends = [dict(run.model.named_parameters()) for run in (whole, resumed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert any("router" in name for name in ends[0])


def test_its_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks("docs/how-to/transformers.md", "python"):
        exec(compile(block, "transformers.md", "exec"), names)
    assert conditional_layers(names["tuned"]).keys() == conditional_layers(names["conversion"].model).keys()
