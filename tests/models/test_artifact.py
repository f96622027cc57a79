"""A saved model loads with bit-identical outputs, or ``load`` raises an error that names the reason."""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

import condconv_surgery as cs
from condconv_surgery.errors import DamagedFileError, InputError
from condconv_surgery.layers import conditional_layers
from condconv_surgery.models.artifact.container import read_recipe
from condconv_surgery.models.checkpoints.recognise_architecture import recognise
from condconv_surgery.models.sources import load_model
from condconv_surgery.recipe import VARIANTS, CondConv, ODConv, Recipe, Source, attach_recipe, recipe_of
from condconv_surgery.runtime.tensor_hash import hash_tensors
from tests.surgery.test_conversion import Net
from tests.training.forked import fresh_python
from tests.variant_cases import scramble

SHUFFLE = "torchvision:shufflenet_v2_x0_5"
EXAMPLE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    plain = torchvision.models.shufflenet_v2_x0_5(weights=None, num_classes=7)
    model = cs.convert(plain, CondConv(experts=2), example=EXAMPLE).model.eval()
    scramble(model)
    path = tmp_path / "m.safetensors"
    cs.save(model, path)
    return path, model


@pytest.mark.parametrize("kind", VARIANTS)
def test_outputs_are_bit_identical(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = torchvision.models.mobilenet_v2(weights=None, width_mult=1.0)
    layers = {"include": ["features.1[5-8].*", "classifier.1"], "classifier": True}
    model = cs.convert(plain, VARIANTS[kind](experts=2), example=EXAMPLE, **layers).model.eval()
    scramble(model)
    cs.save(model, tmp_path / "m.safetensors")
    loaded = cs.load(tmp_path / "m.safetensors")
    assert torch.equal(loaded(EXAMPLE), model(EXAMPLE))
    assert type(loaded) is type(model)
    assert recipe_of(loaded).source.name == "torchvision:mobilenet_v2"
    assert len(recipe_of(loaded).weights_sha256) == 64


def test_a_fresh_process_needs_no_other_argument(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path, model = saved
    torch.save(EXAMPLE, tmp_path / "x.pt")
    code = (
        "import sys, torch, condconv_surgery as cs;"
        "x = torch.load(sys.argv[2], weights_only=True);"
        "torch.save(cs.load(sys.argv[1])(x).detach(), sys.argv[3])"
    )
    arguments = [str(path), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    fresh_python(code, *arguments, folder=tmp_path).check_returncode()
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), model(EXAMPLE), rtol=0, atol=1e-6)


def test_the_recipe_is_json_that_round_trips(saved: tuple[Path, nn.Module]) -> None:
    recipe = read_recipe(saved[0])
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.source.options == {"num_classes": 7}
    assert [row.names[0] for row in recipe.layers] == list(conditional_layers(saved[1]))


def test_shared_layers_stay_shared_and_a_home_made_class_needs_trust(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = cs.convert(Net(), ODConv(experts=2), example=EXAMPLE).model.eval()
    scramble(model)
    path = tmp_path / "net.safetensors"
    cs.save(model, path)
    with pytest.raises(InputError, match=r"names tests.surgery.test_conversion.Net(.|\n)*trust=\[.tests.\]"):
        cs.load(path)
    for loaded in (cs.load(path, trust=("tests",)), cs.load(path, model=Net())):
        assert loaded.twice is loaded.alias
        assert torch.equal(loaded(EXAMPLE), model(EXAMPLE))
    assert "alias.weight" not in load_file(path)  # one tensor, once in the file


def test_tied_parameters_are_stored_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.b.weight = self.a.weight

    with pytest.raises(InputError, match=r"alone could not rebuild(.|\n)*Tied(.|\n)*alone=False"):
        cs.save(Tied(), tmp_path / "t.safetensors")  # a local class has no name to be found by
    assert not (tmp_path / "t.safetensors").exists()
    cs.save(Tied(), tmp_path / "t.safetensors", alone=False)
    with pytest.raises(InputError, match=r"does not say how its model is built(.|\n)*model=MyNet"):
        cs.load(tmp_path / "t.safetensors")
    loaded = cs.load(tmp_path / "t.safetensors", model=Tied())
    assert loaded.a.weight is loaded.b.weight


def test_half_precision_survives(tmp_path: Path) -> None:
    model = torchvision.models.shufflenet_v2_x0_5(weights=None).bfloat16().eval()
    cs.save(model, tmp_path / "m.safetensors")
    loaded = cs.load(tmp_path / "m.safetensors")
    assert torch.equal(loaded(EXAMPLE.bfloat16()), model(EXAMPLE.bfloat16()))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    saved: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = saved
    before = path.read_bytes()
    model = nn.Conv2d(3, 3, 1)
    monkeypatch.setattr(nn.Conv2d, "get_extra_state", lambda self: object())  # not a tensor
    with pytest.raises(InputError, match="Only dense tensors can be saved"):
        cs.save(model, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    monkeypatch.undo()
    with pytest.raises(InputError, match="could not be written"):
        cs.save(nn.Conv2d(3, 3, 1), path.parent / "nowhere" / "m.safetensors")


def test_a_read_only_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not let a file be removed either, not even one that is not there."""

    def read_only(path: Path, *args: object, **how: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "touch", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(InputError, match=r"m\.safetensors could not be written: .*Read-only file system"):
        cs.save(nn.Conv2d(3, 3, 1), tmp_path / "m.safetensors")


def rewrite(path: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: object) -> None:
    """Change tensors or metadata, as someone who knows the format can; ``recipe`` is a function of the old one."""
    old = load_file(path)
    tensors = old if tensors is None else tensors
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    metadata = header["__metadata__"]
    for name, change in changes.items():
        metadata[name] = json.dumps(change(json.loads(metadata[name]))) if callable(change) else change
    metadata["tensors_sha256"] = hash_tensors(tensors, headers=False)
    save_file(tensors, path, metadata)


def test_a_truncated_file(saved: tuple[Path, nn.Module]) -> None:
    path, _ = saved
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DamagedFileError, match="cannot be read as safetensors"):
        cs.load(path)


@pytest.mark.parametrize(
    "header", [struct.pack("<Q", 2**62), struct.pack("<q", -1), b"\x10\0\0\0\0\0\0\0not json at all!"]
)
def test_a_hostile_header(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(header)
    with pytest.raises(DamagedFileError, match="cannot be read as safetensors"):
        cs.load(path)


def test_a_newer_file(saved: tuple[Path, nn.Module]) -> None:
    rewrite(saved[0], recipe=lambda recipe: {**recipe, "format": 99})
    with pytest.raises(DamagedFileError, match=r"format 99(.|\n)*pip install --upgrade"):
        cs.load(saved[0])


def test_a_recipe_that_is_not_one(saved: tuple[Path, nn.Module]) -> None:
    rewrite(saved[0], recipe="{{{")
    with pytest.raises(DamagedFileError, match="its recipe is not JSON"):
        cs.load(saved[0])
    rewrite(saved[0], recipe='{"format": 1}')
    with pytest.raises(DamagedFileError, match="recipe cannot be read"):
        cs.load(saved[0])


@pytest.mark.parametrize("factory", ["os:system", "subprocess:run", "builtins:eval", "../evil:run"])
def test_a_recipe_never_makes_us_import(saved: tuple[Path, nn.Module], factory: str) -> None:
    rewrite(saved[0], recipe=lambda r: {**r, "source": {"name": factory, "options": {"command": "touch x"}}})
    with pytest.raises(InputError, match="only torchvision, timm and registered sources are imported"):
        cs.load(saved[0])


def test_a_recipe_that_names_what_is_not_there(saved: tuple[Path, nn.Module]) -> None:
    rewrite(saved[0], recipe=lambda r: {**r, "layers": [{**r["layers"][0], "names": ["conv5.nowhere"]}]})
    with pytest.raises(DamagedFileError, match="does not fit its own source"):
        cs.load(saved[0])


def test_one_altered_bit(saved: tuple[Path, nn.Module]) -> None:
    data = bytearray(saved[0].read_bytes())
    data[-1000] ^= 1
    saved[0].write_bytes(data)
    with pytest.raises(DamagedFileError, match="not the ones that were written"):
        cs.load(saved[0])


def test_tensors_that_do_not_fit(saved: tuple[Path, nn.Module]) -> None:
    path, _ = saved
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 4)
    rewrite(path, {**tensors, name: tensors[name][:1].contiguous()})
    with pytest.raises(DamagedFileError, match="has shape"):
        cs.load(path)
    rewrite(path, {**tensors, name: tensors[name].long()})
    with pytest.raises(DamagedFileError, match=r"has dtype torch.int64"):
        cs.load(path)
    rewrite(path, {key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(DamagedFileError, match="it lacks"):
        cs.load(path)


def test_a_width_that_no_tensor_has_is_not_built(saved: tuple[Path, nn.Module]) -> None:
    for change in ({"heads": {"fc": 10**12}}, {"source": {"name": SHUFFLE, "options": {"num_classes": 10**12}}}):
        rewrite(saved[0], recipe=lambda recipe, change=change: {**recipe, **change})
        with pytest.raises(DamagedFileError, match=r"a width of 1000000000000, the largest of its tensors"):
            cs.load(saved[0])
        rewrite(saved[0], recipe=lambda recipe: {**recipe, "heads": {}})


def test_a_changed_activation_is_kept(tmp_path: Path) -> None:
    """Names and shapes are those of the library's model, its function is not."""
    model = torchvision.models.shufflenet_v2_x0_5(weights=None).eval()
    attach_recipe(model, Recipe(source=Source(SHUFFLE)))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU):
            model.set_submodule(name, nn.SiLU())
    converted = cs.convert(model, CondConv(experts=2), example=EXAMPLE).model.eval()
    cs.save(converted, tmp_path / "m.safetensors")
    assert torch.equal(cs.load(tmp_path / "m.safetensors")(EXAMPLE), converted(EXAMPLE))


def test_a_network_of_plain_layers_needs_no_code(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, padding="same", padding_mode="circular"))
    converted = cs.convert(model, ODConv(experts=2), example=EXAMPLE).model.eval()
    scramble(converted)
    cs.save(converted, tmp_path / "m.safetensors")
    assert torch.equal(cs.load(tmp_path / "m.safetensors")(EXAMPLE), converted(EXAMPLE))


def test_a_foreign_safetensors_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="not one that condconv wrote"):
        cs.load(tmp_path / "m.safetensors")


def test_a_fine_tuned_artifact_is_a_source(saved: tuple[Path, nn.Module]) -> None:
    model = load_model(str(saved[0]))
    assert torch.equal(model(EXAMPLE), saved[1](EXAMPLE))


def doubled(*seen: object) -> torch.Tensor:
    return seen[2] * 2


def hooked() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).eval()
    model[1].register_forward_hook(doubled)
    return model


def test_a_hook_on_a_converted_layer_is_not_lost_unsaid(tmp_path: Path) -> None:
    torch.manual_seed(0)
    converted = cs.convert(hooked(), CondConv(experts=2), example=EXAMPLE).model.eval()
    scramble(converted)
    with pytest.raises(InputError, match="alone could not rebuild the model: a CondConv2d has hooks"):
        cs.save(converted, tmp_path / "m.safetensors")
    cs.save(converted, tmp_path / "m.safetensors", alone=False)
    with pytest.raises(InputError, match=r"a CondConv2d has hooks(.|\n)*model=MyNet"):
        cs.load(tmp_path / "m.safetensors")
    assert torch.equal(cs.load(tmp_path / "m.safetensors", model=hooked())(EXAMPLE), converted(EXAMPLE))


def test_one_package_as_a_text_is_trusted(tmp_path: Path) -> None:
    cs.save(Net(), tmp_path / "m.safetensors")
    assert type(cs.load(tmp_path / "m.safetensors", trust="tests")) is Net
    with pytest.raises(InputError, match=r"trust=\[.os.\] would let a file run anything"):
        cs.load(tmp_path / "m.safetensors", trust="os")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_file_may_be_read_by_whom_others_may_be(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        (tmp_path / "plain").write_bytes(b"")
        cs.save(nn.Sequential(nn.Conv2d(3, 3, 1)), tmp_path / "m.safetensors")
        modes = {(tmp_path / name).stat().st_mode for name in ("plain", "m.safetensors")}
        assert len(modes) == 1
        (tmp_path / "m.safetensors").chmod(0o640)
        cs.save(nn.Sequential(nn.Conv2d(3, 3, 1)), tmp_path / "m.safetensors")
        assert stat.S_IMODE((tmp_path / "m.safetensors").stat().st_mode) == 0o640
    finally:
        os.umask(before)


@pytest.mark.parametrize("place", ["", ".", "folder"])
def test_a_folder_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        InputError, match=rf"{place or '.'} could not be written: it is a folder(.|\n)*model.safetensors"
    ):
        cs.save(nn.Sequential(nn.Conv2d(3, 3, 1)), place)
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]
    assert not any((tmp_path / "folder").iterdir())


def test_a_torch_file_is_no_artifact(tmp_path: Path) -> None:
    torch.save(nn.Conv2d(3, 3, 1).state_dict(), tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"m.pt is a torch file(.|\n)*load_model\(.*m.pt"):
        cs.load(tmp_path / "m.pt")


class FrozenNorm(Net):
    """As mmcv's networks keep their batch norms in eval mode."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


def test_a_model_whose_train_returns_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = FrozenNorm()
    torch.save(original, tmp_path / "m.pt")
    cs.save(original, tmp_path / "m.safetensors")
    original.eval()
    for model in (
        cs.load(tmp_path / "m.safetensors", trust="tests"),
        load_model(tmp_path / "m.pt", trust="tests"),
        load_model("tests.models.test_artifact:FrozenNorm", weights=tmp_path / "m.pt", trust="tests"),
    ):
        assert not model.training
        assert torch.equal(model(EXAMPLE), original(EXAMPLE))


def test_a_run_does_not_change_what_a_model_is(tmp_path: Path) -> None:
    """RAFT keeps the correlations of its last run; the small one has less layers than the family's first."""
    torch.manual_seed(0)
    model = torchvision.models.optical_flow.raft_small(weights=None).eval()
    frames = (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))
    with torch.no_grad():
        expected = model(*frames, num_flow_updates=1)[0]
    cs.save(model, tmp_path / "m.safetensors")
    assert read_recipe(tmp_path / "m.safetensors").source == Source("torchvision:raft_small")
    assert read_recipe(tmp_path / "m.safetensors").source == recognise(
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    )
    with torch.no_grad():
        assert torch.equal(cs.load(tmp_path / "m.safetensors")(*frames, num_flow_updates=1)[0], expected)
    model.add_module("mark", nn.Identity())  # described, module by module
    attach_recipe(model, Recipe())
    cs.save(model, tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(cs.load(tmp_path / "m.safetensors")(*frames, num_flow_updates=1)[0], expected)
