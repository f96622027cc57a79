"""Files of other programs: where the network is in them, what of its stem and head may differ, and what is said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.models.sources import load_model
from condconv_surgery.recipe import Source, recipe_of
from condconv_surgery.runtime.modes import input_spec_of

ROOT = Path(__file__).parents[2]
SMALL = "torchvision:shufflenet_v2_x0_5"
State = dict[str, torch.Tensor]


def small(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.shufflenet_v2_x0_5(weights=None, **options).eval()


def under(prefix: str, state: State, of: float = 1.0) -> State:
    return {f"{prefix}{name}": tensor * of for name, tensor in state.items()}


def body(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


def as_children(state: State) -> State:
    names = [name for name, _ in small().named_children()]
    return {f"{names.index(name.partition('.')[0])}.{name.partition('.')[2]}": tensor for name, tensor in state.items()}


def with_lit_ema(state: State) -> State:
    """Parameters and, under their names without dots, their averages; buffers have none."""
    parameters = [name for name, _ in small().named_parameters()]
    return {
        **under("model.", {name: tensor * (1 + (name in parameters)) for name, tensor in state.items()}),
        **{f"model_ema.{name.replace('.', '')}": state[name] for name in parameters},
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7),
    }


RANDOM = "fc.weight, fc.bias is random until it is trained"

FILES: dict[str, tuple[Callable[[State], Any], str, bool]] = {
    "Lightning `.ckpt`": (
        lambda s: {
            "state_dict": {**under("net.", s), "criterion.weight": torch.ones(3)},
            "epoch": 3,
            "pytorch-lightning_version": "2.6.6",
            "hyper_parameters": {"lr": 0.1},
        },
        r"took the weights under 'state_dict'(.|\n)*left out criterion.weight",
        True,
    ),
    "Fabric": (lambda s: {"model": s, "optimizer": {"state": {}}, "step": 7}, "took the weights under 'model'", True),
    "DeepSpeed, consolidated": (
        lambda s: {"state_dict": under("_forward_module.model.", s)},
        "took the weights under 'state_dict'",
        True,
    ),
    "DeepSpeed, `mp_rank_00_model_states.pt`": (
        lambda s: {"module": under("module.", s), "ds_version": "0.17", "dp_world_size": 2},
        "took the weights under 'module'",
        True,
    ),
    "timm `model_best.pth.tar`": (
        lambda s: {"arch": "x", "state_dict": under("", s, 2), "state_dict_ema": s},
        r"took the weights under 'state_dict_ema' \(averaged\), not those under state_dict",
        True,
    ),
    "BasicSR": (
        lambda s: {"params": under("", s, 2), "params_ema": s},
        r"took the weights under 'params_ema' \(averaged\), not those under params",
        True,
    ),
    "lucidrains' `ema_state_dict`": (
        lambda s: {"model": under("", s, 2), "ema_state_dict": under("ema_model.", s)},
        r"took the weights under 'ema_state_dict' \(averaged\), not those under model",
        True,
    ),
    "latent diffusion (LitEma)": (
        lambda s: {"state_dict": with_lit_ema(s), "global_step": 7},
        r"took 170 averaged weights under 'model_ema\.' \(LitEma\) in the place of those under 'model\.'",
        True,
    ),
    "mean teacher": (lambda s: {**under("student.", s, 2), **under("teacher.", s)}, "left out student", True),
    "DINO": (
        lambda s: {
            "student": under("module.backbone.", body(s), 2),
            "teacher": {
                **under("backbone.", body(s)),
                "head.mlp.0.weight": torch.ones(9, 1024),
                "head.last_layer.weight_v": torch.ones(9, 9),
            },
        },
        rf"took the weights under 'teacher' \(averaged\), not those under student(.|\n)*{RANDOM}",
        False,
    ),
    "MoCo v1": (
        lambda s: {
            "state_dict": {
                **under("module.encoder_k.", s, 2),
                **under("module.encoder_q.", s),
                "module.queue": torch.ones(9),
            }
        },
        "left out module.encoder_k.conv1.0.weight",
        True,
    ),
    "MoCo v2": (
        lambda s: {
            "state_dict": {
                f"module.{encoder}.{name}": tensor * of
                for encoder, of in (("encoder_q", 1), ("encoder_k", 2))
                for name, tensor in {
                    **body(s),
                    "fc.0.weight": torch.ones(1024, 1024),
                    "fc.2.weight": torch.ones(128, 1024),
                }.items()
            }
        },
        rf"left out the file's head \(fc.0.weight, fc.2.weight\)(.|\n)*{RANDOM}",
        False,
    ),
    "MoCo v3": (
        lambda s: {
            "state_dict": {
                **under("module.momentum_encoder.", s, 2),
                **under("module.base_encoder.", s),
                "module.predictor.0.weight": torch.ones(9),
            }
        },
        "left out module.momentum_encoder.conv1.0.weight",
        True,
    ),
    "BYOL": (
        lambda s: {
            "state_dict": {
                **under("target_network.encoder.", body(s), 2),
                **under("online_network.encoder.", body(s)),
                "online_network.projector.0.weight": torch.ones(512, 1024),
                "online_network.projector.3.weight": torch.ones(256, 512),
            }
        },
        rf"left out target_network.encoder(.|\n)*{RANDOM}",
        False,
    ),
    "SimCLR": (
        lambda s: {
            "state_dict": {
                **under("backbone.", body(s)),
                "backbone.fc.0.weight": torch.ones(1024, 1024),
                "backbone.fc.2.weight": torch.ones(128, 1024),
            }
        },
        rf"left out the file's head(.|\n)*{RANDOM}",
        False,
    ),
    "lightly": (
        lambda s: {
            "state_dict": {
                **under("backbone.", as_children(body(s))),
                "projection_head.layers.0.weight": torch.ones(1024, 1024),
                "projection_head.layers.3.weight": torch.ones(128, 1024),
            }
        },
        rf"left out projection_head.layers.0.weight(.|\n)*{RANDOM}",
        False,
    ),
    "mmcls": (
        lambda s: {
            "meta": {"epoch": 3},
            "state_dict": {
                **under("backbone.", body(s)),
                "head.fc.weight": s["fc.weight"],
                "head.fc.bias": s["fc.bias"],
            },
        },
        "took head.fc.weight as the head fc, 1000 classes",
        True,
    ),
    "fastai `learn.save`": (
        lambda s: {
            "model": {
                **under("0.", as_children(body(s))),
                "1.2.weight": torch.ones(2048),
                "1.4.weight": torch.ones(512, 2048),
                "1.8.weight": torch.ones(9, 512),
            },
            "opt": {},
        },
        rf"left out 1.2.weight(.|\n)*{RANDOM}",
        False,
    ),
    "`DataParallel`, `torch.compile`, your wrapper": (lambda s: under("module._orig_mod.my_classifier.", s), "", True),
}
"""Of the table in ``docs/how-to/convert.md``: the file, what must be logged, and whether the head is the file's."""


@pytest.mark.parametrize("arch", [SMALL, None])
@pytest.mark.parametrize("program", FILES)
def test_the_network_is_found(program: str, arch: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make, said, with_head = FILES[program]
    state = small().state_dict()
    torch.save(make(state), tmp_path / "m.pt")
    model = load_model(tmp_path / "m.pt", arch=arch)
    assert recipe_of(model).source == Source(SMALL)
    equal = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, state[name])]
    assert equal == [name for name in state if with_head or not name.startswith("fc.")]
    assert re.search(said, "\n".join(record.getMessage() for record in caplog.records))
    assert bool(caplog.records) == bool(said)


def test_the_table_of_the_docs_has_the_files_of_this_test() -> None:
    text = (ROOT / "docs/how-to/convert.md").read_text(encoding="utf-8")
    table = text.partition("| program |")[2].partition("\n\n")[0]
    rows = [row.split(" | ")[0].removeprefix("| ") for row in table.splitlines()[2:]]
    assert rows == list(FILES)


def other_head(state: State, **tensors: torch.Tensor) -> State:
    return {**body(state), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}


OUTER: dict[str, tuple[Callable[[State], State], str, int, int]] = {
    "grey images": (
        lambda s: {**s, "conv1.0.weight": s["conv1.0.weight"][:, :1]},
        "conv1.0.weight takes 1 channels",
        1,
        1000,
    ),
    "four channels": (
        lambda s: {**s, "conv1.0.weight": torch.ones(24, 4, 3, 3)},
        "conv1.0.weight takes 4 channels",
        4,
        1000,
    ),
    "grey images, with a bias": (
        lambda s: {**s, "conv1.0.weight": s["conv1.0.weight"][:, :1], "conv1.0.bias": torch.zeros(24)},
        "conv1.0.weight takes 1 channels, as in the file; its stride and padding",
        1,
        1000,
    ),
    "another width": (
        lambda s: other_head(s, fc__weight=torch.ones(9, 1024), fc__bias=torch.ones(9)),
        "9 classes, as in the file",
        3,
        9,
    ),
    "without a bias": (lambda s: other_head(s, fc__weight=torch.ones(9, 1024)), "9 classes, as in the file", 3, 9),
    "a dropout before": (
        lambda s: other_head(s, fc__1__weight=torch.ones(9, 1024), fc__1__bias=torch.ones(9)),
        "took fc.1.weight as the head fc, 9 classes",
        3,
        9,
    ),
    "another name": (
        lambda s: other_head(s, classifier__weight=torch.ones(9, 1024), classifier__bias=torch.ones(9)),
        "took classifier.weight as the head fc, 9 classes",
        3,
        9,
    ),
    "two layers": (
        lambda s: other_head(s, fc__0__weight=torch.ones(64, 1024), fc__3__weight=torch.ones(9, 64)),
        RANDOM,
        3,
        1000,
    ),
    "none": (body, rf"the file has no head: {RANDOM}", 3, 1000),
    "grey images, another width": (
        lambda s: {
            **other_head(s, fc__weight=torch.ones(9, 1024), fc__bias=torch.ones(9)),
            "conv1.0.weight": s["conv1.0.weight"][:, :1],
        },
        r"takes 1 channels(.|\n)*9 classes, as in the file",
        1,
        9,
    ),
}


@pytest.mark.parametrize("arch", [SMALL, None])
@pytest.mark.parametrize("kind", OUTER)
def test_another_stem_or_head_is_taken_and_named(
    kind: str, arch: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, said, channels, classes = OUTER[kind]
    state = change(small().state_dict())
    torch.save(state, tmp_path / "m.pt")
    model = load_model(tmp_path / "m.pt", arch=arch)
    assert recipe_of(model).source.name == SMALL
    assert recipe_of(model).input.channels == channels
    assert re.search(said, "\n".join(record.getMessage() for record in caplog.records))
    x = torch.randn(2, channels, 64, 64)
    assert model(x).shape == (2, classes)
    if "random" not in said:
        features = nn.Sequential(*list(model.children())[:-1])(x).mean((2, 3))
        weight = next(t for name, t in reversed(state.items()) if t.shape == (classes, 1024))
        bias = next((t for t in state.values() if t.shape == (classes,)), torch.zeros(classes))
        torch.testing.assert_close(model(x), nn.functional.linear(features, weight, bias))
    if arch is None:
        cs.save(model, tmp_path / "m.safetensors")
        assert torch.equal(cs.load(tmp_path / "m.safetensors")(x), model(x))


def test_weights_of_a_name_may_have_another_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(OUTER["a dropout before"][0](small().state_dict()), tmp_path / "m.pt")
    model = load_model(SMALL, weights=tmp_path / "m.pt")
    assert recipe_of(model).heads == {"fc": 9}
    assert torch.equal(model.fc.weight, torch.ones(9, 1024))
    with pytest.raises(InputError, match="do not fit"):
        load_model(SMALL, weights=tmp_path / "m.pt", num_classes=5)


def test_a_head_of_several_layers_keeps_what_fits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    original = torchvision.models.mobilenet_v3_small(weights=None, num_classes=1000).eval()
    state = {name: t for name, t in original.state_dict().items() if not name.startswith("classifier.3")}
    torch.save(state, tmp_path / "m.pt")
    model = load_model(tmp_path / "m.pt")
    assert torch.equal(model.classifier[0].weight, original.classifier[0].weight)
    assert "classifier.3.weight, classifier.3.bias is random" in caplog.text


@pytest.mark.parametrize("change", ["a layer less", "a layer more", "another width inside"])
def test_a_body_must_fit(change: str, tmp_path: Path) -> None:
    state = body(small().state_dict())
    if change == "a layer less":
        del state["stage2.0.branch1.0.weight"]
    elif change == "a layer more":
        state["stage2.9.weight"] = torch.ones(3)
    else:
        state["stage2.0.branch1.0.weight"] = torch.ones(25, 1, 3, 3)
    torch.save(state, tmp_path / "m.pt")
    for arch in (SMALL, None):
        with pytest.raises(InputError, match=r"do not fit|no known architecture"):
            load_model(tmp_path / "m.pt", arch=arch)


def test_a_detector_has_no_head_that_may_be_random(tmp_path: Path) -> None:
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    state = torchvision.models.get_model(name, weights=None, weights_backbone=None).state_dict()
    without = {key: tensor for key, tensor in state.items() if not key.startswith("roi_heads")}
    torch.save(without, tmp_path / "m.pt")
    with pytest.raises(InputError, match="it lacks 'roi_heads"):
        load_model(tmp_path / "m.pt", arch=f"torchvision:{name}")


def test_a_checkpoint_in_several_files_is_read_by_its_index(tmp_path: Path) -> None:
    state, folder = small().state_dict(), tmp_path / "shards"
    folder.mkdir()
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    parts = [dict(list(state.items())[number::2]) for number in range(2)]
    for file, part in zip(files, parts, strict=True):
        save_file(part, folder / file)
    index = folder / "model.safetensors.index.json"
    places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    read = load_model(f"{index}").state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    for path in (folder, folder / files[1]):  # a part alone is never taken for the whole
        with pytest.raises(InputError, match=f"Try: {re.escape(str(index))}"):
            load_model(f"{path}")
    (folder / files[0]).unlink()
    with pytest.raises(InputError, match=f"{files[0]} does not exist"):
        load_model(f"{index}")
    index.write_text("{}")
    with pytest.raises(cs.SurgeryError, match="weight_map names the file of each tensor"):
        load_model(f"{index}")


def test_the_only_weights_are_taken_whatever_their_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, state = tmp_path / "run.pt", small().state_dict()
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": []}
    torch.save({"step": 3, "my_net": state, "optimizer": optimizer}, path)
    read = load_model(f"{path}").state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    assert "took the weights under 'my_net'" in caplog.text
    torch.save({"generator": state, "discriminator": under("", state, 0.5)}, path)
    with pytest.raises(
        InputError, match=r"several sets of weights(.|\n)*Try: torch\.save\(torch\.load\(.*\['generator'\]"
    ):
        load_model(f"{path}")


@pytest.mark.parametrize("by_name", [False, True])
def test_the_channels_of_a_file_with_another_stem_are_the_inputs(by_name: bool, tmp_path: Path) -> None:
    """Whether the file is the model, or the weights of a name; TResNet's stem takes the pixels of 3 channels as 48."""
    grey = torchvision.models.resnet18(num_classes=3)
    grey.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    timm = pytest.importorskip("timm")
    networks = {"torchvision:resnet18": grey, "timm:tresnet_m": timm.create_model("tresnet_m", num_classes=3)}
    for (name, network), channels in zip(networks.items(), (1, 3), strict=True):
        path = tmp_path / "weights.pt"
        torch.save(network.state_dict(), path)
        model = load_model(name, weights=path) if by_name else load_model(path, arch=name)
        assert input_spec_of(model).channels == channels
