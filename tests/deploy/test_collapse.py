from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.deploy.collapse_mixtures import mean_kernel
from condconv_surgery.deploy.deployment_images import deployment_images
from condconv_surgery.layers import conditional_layers, conditional_like, routers
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.recipe import CondConv, DynamicConv, InputSpec, ODConv, Variant
from condconv_surgery.training import fit_heads
from tests.conftest import Run
from tests.geometries import GEOMETRIES
from tests.images import write_images
from tests.reference import per_sample_loop
from tests.small_networks import small_net
from tests.variant_cases import EVERY_VARIANT, scramble

IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def resnet(variant: Variant, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    plain = torchvision.models.resnet18(weights=None, num_classes=3).eval()
    options = {"include": ["layer[34].*"], "example": IMAGES[:2], "prove": False, **options}
    return cs.convert(plain, variant, **options).model.eval()


@torch.no_grad()
def with_mean_mixtures(model: nn.Module, x: Tensor, frozen: list[str] | None = None) -> Tensor:
    """The outputs with each mixture replaced by its mean over ``x``, router after router."""
    found: dict[str, Mixture] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, mixture: Mixture) -> None:
            found[name] = Mixture(*(None if p is None else p.mean(0, keepdim=True) for p in mixture))

        return hook

    def replace(name: str) -> Any:
        return lambda module, inputs, mixture: Mixture(
            *(None if p is None else m.expand_as(p) for m, p in zip(found[name], mixture, strict=True))
        )

    chosen = {name: router for name, router in routers(model).items() if frozen is None or name in frozen}
    handles = [router.register_forward_hook(record(name)) for name, router in chosen.items()]
    model(x)
    for handle in handles:
        handle.remove()
    handles = [router.register_forward_hook(replace(name)) for name, router in chosen.items()]
    y = model(x)
    for handle in handles:
        handle.remove()
    return y


@pytest.mark.parametrize("variant", EVERY_VARIANT, ids=str)
@torch.no_grad()
def test_every_variant_is_its_network_with_mean_mixtures(variant: Variant) -> None:
    model = small_net(variant).eval()
    scramble(model)
    result = cs.collapse(model, IMAGES)
    assert result.model is not None
    assert not conditional_layers(result.model)
    assert conditional_layers(model), "a copy was collapsed"
    torch.testing.assert_close(result.model(IMAGES), with_mean_mixtures(model, IMAGES), rtol=1e-5, atol=1e-5)
    small_net().load_state_dict(result.model.state_dict(), strict=True)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("name", GEOMETRIES)
@torch.no_grad()
def test_the_kernel_of_every_geometry_against_the_loop(name: str) -> None:
    layer = conditional_like(nn.Conv2d(**GEOMETRIES[name]), ODConv(experts=3, heads="all"))
    scramble(layer)
    layer = layer.eval()
    x = torch.randn(1, GEOMETRIES[name]["in_channels"], 10, 9)
    mixture = layer.route(x)
    kernel, bias = mean_kernel(layer, mixture)
    plain = nn.Conv2d(**GEOMETRIES[name])
    plain.weight.copy_(kernel)
    if bias is not None:
        plain.bias.copy_(bias)
    expected = per_sample_loop(x, layer.weight, layer.bias, mixture, layer.geometry)
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", [CondConv(4), DynamicConv(4), ODConv(1), ODConv(4)], ids=str)
@torch.no_grad()
def test_a_conversion_that_was_never_trained_collapses_to_the_original(variant: Variant) -> None:
    torch.manual_seed(0)
    original = torchvision.models.mobilenet_v3_small(weights=None, num_classes=3).eval()
    state = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    model = cs.convert(original, variant, example=IMAGES[:2], prove=False).model
    collapsed = cs.collapse(model, IMAGES).model
    assert collapsed is not None
    assert type(collapsed) is type(original)
    again = torchvision.models.mobilenet_v3_small(weights=None, num_classes=3)
    again.load_state_dict(collapsed.state_dict(), strict=True)
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_kept_layers_and_blocks() -> None:
    model = resnet(CondConv(4))
    scramble(model)
    some = cs.collapse(model, IMAGES, keep=["layer4.1.*"])
    assert [layer.name for layer in some.layers if layer.kept] == [
        layer.name for layer in some.layers if layer.name.startswith("layer4.1.")
    ]
    assert set(conditional_layers(some.model)) == {"layer4.1.conv1", "layer4.1.conv2"}
    frozen = [name for name in routers(model) if not name.startswith("layer4.1.")]
    torch.testing.assert_close(some.model(IMAGES), with_mean_mixtures(model, IMAGES, frozen), rtol=1e-4, atol=1e-4)
    three = cs.collapse(model, IMAGES, keep=3)
    variations = [layer.variation for layer in three.layers]
    assert variations == sorted(variations, reverse=True)
    assert [bool(layer.kept) for layer in three.layers] == [True] * 3 + [False] * (len(variations) - 3)


@torch.no_grad()
def test_a_block_that_routes_once_stays_or_goes_as_a_whole(tmp_path: Path) -> None:
    model = resnet(CondConv(2, routing="block"))
    scramble(model)
    result = cs.collapse(model, IMAGES, keep=["layer4.1.conv2"])
    assert set(conditional_layers(result.model)) == {"layer4.1.conv1", "layer4.1.conv2"}
    frozen = [name for name in routers(model) if name != "layer4.1"]
    expected = with_mean_mixtures(model, IMAGES, frozen)
    torch.testing.assert_close(result.model(IMAGES), expected, rtol=1e-4, atol=1e-4)
    cs.save(result.model, tmp_path / "m.safetensors")
    assert torch.equal(cs.load(tmp_path / "m.safetensors")(IMAGES), result.model(IMAGES))
    whole = cs.collapse(model, IMAGES).model
    torchvision.models.resnet18(num_classes=3).load_state_dict(whole.state_dict(), strict=True)


def test_max_drop_keeps_as_few_as_it_takes() -> None:
    """Labels are what the model says: collapsing costs accuracy, keeping all costs none."""
    model = resnet(CondConv(4))
    scramble(model)
    images = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 3
    with torch.no_grad():
        labels = model(images).argmax(1)
    data = [(images, labels)]
    strict = cs.collapse(model, data, max_drop=0.0, dry_run=True)
    assert strict.model is None
    assert strict.before == 1.0
    assert strict.after == 1.0
    loose = cs.collapse(model, data, max_drop=100.0)
    assert not any(layer.kept for layer in loose.layers)
    with torch.no_grad():
        top1 = float((loose.model(images).argmax(1) == labels).double().mean())
    assert loose.after == pytest.approx(top1)


@torch.no_grad()
def test_standardised_kernels() -> None:
    """A plain layer of timm standardises a mean kernel as the conditional one does; ODConv's scales do not fit in."""
    for variant, kept in ((CondConv(2), 0), (ODConv(1), 2)):
        torch.manual_seed(0)
        plain = timm.create_model("resnetv2_50x1_bit", num_classes=3).eval()
        options: dict[str, Any] = {"include": ["stages.3.blocks.2.conv[23]"], "prove": False}
        model = cs.convert(plain, variant, example=IMAGES[:2], **options).model.eval()
        scramble(model)
        result = cs.collapse(model, IMAGES)
        assert len(conditional_layers(result.model)) == kept
        frozen = None if not kept else []
        expected = with_mean_mixtures(model, IMAGES, frozen)
        torch.testing.assert_close(result.model(IMAGES), expected, rtol=1e-4, atol=1e-4)


def test_refusals() -> None:
    model = resnet(CondConv(2))
    with pytest.raises(cs.InputError, match="has no conditional layer"):
        cs.collapse(small_net(), IMAGES)
    with pytest.raises(cs.InputError, match=r'keep=\["layer5\.\*"\] matches none of'):
        cs.collapse(model, IMAGES, keep=["layer5.*"])
    with pytest.raises(cs.InputError) as raised:
        cs.collapse(model, IMAGES, keep="layer4")  # a text, and the name of a module
    assert raised.value.fix == 'keep=["layer4.*"]'
    kept = cs.collapse(model, IMAGES, keep="layer4.*", dry_run=True).layers
    assert {layer.name for layer in kept if layer.kept} == {layer.name for layer in kept if "layer4" in layer.name}
    with pytest.raises(cs.InputError, match="no labels are known"):
        cs.collapse(model, IMAGES, max_drop=0.5)
    with pytest.raises(cs.InputError, match="points of top-1, 0 to 100"):
        cs.collapse(model, IMAGES, max_drop=-1.0)
    with pytest.raises(cs.InputError, match=r"keep=-1\."):
        cs.collapse(model, IMAGES, keep=-1)
    with pytest.raises(cs.InputError, match="of shape"):
        cs.collapse(model, torch.zeros(3, 4))
    with pytest.raises(cs.InputError, match="holds no images"):
        cs.collapse(model, [])
    with pytest.raises(cs.InputError, match="the original class has its batch norms".capitalize()):
        cs.collapse(cs.fold(model, example=IMAGES[:2]).model, IMAGES)


def test_the_command(condconv: Run, tmp_path: Path) -> None:
    data, x = write_images(tmp_path / "data", side=32), IMAGES
    model = resnet(CondConv(2))
    scramble(model)
    fit_heads(model, ("class0", "class1", "class2"), InputSpec(height=32, width=32))
    artifact, plain = tmp_path / "m.safetensors", tmp_path / "plain.safetensors"
    cs.save(model, artifact)
    code, out, err = condconv("collapse", artifact, "--data", data, "-o", plain, "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["kept"] == 0
    assert summary["collapsed"] == len(conditional_layers(model))
    assert 0 <= summary["top1"]["after"] <= 1
    original = torchvision.models.resnet18(num_classes=3).eval()
    original.load_state_dict(load_file(plain), strict=True)
    with torch.no_grad():
        assert torch.equal(original(x), cs.load(plain)(x))
    before = artifact.read_bytes()
    code, out, err = condconv("collapse", artifact, "--data", data, "--keep", 2, "--dry-run")
    assert code == 0, err
    assert "keep: among the 2 that vary most" in " ".join(out.split())
    assert "Top-1" in err
    assert artifact.read_bytes() == before
    code, _, err = condconv("collapse", artifact, "--data", data, "-o", plain, "--keep", "layer9.*")
    assert code == 2
    assert '--keep "layer9.*" matches none' in err
    assert condconv("collapse", artifact, "-o", plain)[0] == 2


def test_the_directory_of_a_run_stands_for_its_images(
    condconv: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run = write_images(tmp_path / "data", classes=3, each=5, side=32), tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(f'[data]\nfolder = "{data}"\n')
    (run / "curves.png").write_bytes(next(data.rglob("*.png")).read_bytes())  # no training image
    model = resnet(CondConv(2))
    fit_heads(model, ("class0", "class1", "class2"), InputSpec(height=32, width=32))
    found = deployment_images(model, run, 1000)
    assert [len(images) for images, _ in found.calibration] == [12]
    assert [len(labels) for _, labels in found.labelled] == [3]
    assert found.scored_on == f"3 images of {data} (validation images of {run})."
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        assert deployment_images(model, "run", 1000).scored_on == "3 images of data (validation images of run)."
    plain = deployment_images(model, data, 1000)
    assert plain.scored_on.startswith(f"15 images of {data}. The data have no validation part")

    cs.save(model, run / "best.safetensors")
    code, _, err = condconv("collapse", run / "best.safetensors", "--data", "run", "-o", tmp_path / "p.safetensors")
    assert code == 0, err
    assert f"on 3 images of {data} (validation images of {run})" in " ".join(err.split())


def test_a_train_that_returns_nothing(tmp_path: Path) -> None:
    class FrozenNorms(nn.Sequential):
        def train(self, mode: bool = True) -> None:  # type: ignore[override]
            super().train(mode)
            self[1].eval()

    plain = FrozenNorms(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    model = cs.convert(plain, CondConv(2), example=IMAGES).model
    scramble(model)
    model.eval()
    assert cs.fold(model, example=IMAGES).folded
    assert cs.export(model, tmp_path / "m.pt2", to="pt2", size=32).difference < 1e-4
