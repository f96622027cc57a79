"""Models are built on the meta device for their shapes without changing torch for anybody else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum

import condconv_surgery as cs
from condconv_surgery.models.artifact.meta_init import build_on_meta
from condconv_surgery.models.checkpoints.recognise_architecture import recognise
from condconv_surgery.models.torchvision_source import build_published
from condconv_surgery.recipe import Source


@contextmanager
def in_another_thread(work: Callable[[], None]) -> Iterator[None]:
    """Repeat ``work`` in a thread while the block runs; an error there is raised here."""
    ended, errors = threading.Event(), []

    def repeat() -> None:
        try:
            while not ended.is_set():
                work()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("call", ["save", "recognise"])
def test_layers_made_in_another_thread_are_real_and_initialised(call: str, tmp_path: Path) -> None:
    model = torchvision.models.shufflenet_v2_x0_5(weights=None).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    made = []

    def build() -> None:
        layer = nn.Linear(3, 2)
        assert not layer.weight.is_meta
        assert bool(layer.weight.any())
        made.append(layer)

    with in_another_thread(build):
        for _ in range(3):
            cs.save(model, tmp_path / "m.safetensors") if call == "save" else recognise(shapes)
    assert made


def test_methods_of_torch_are_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen by every call of a factory while a model is built for its shapes."""
    register, uniform = nn.Module.register_parameter, torch.Tensor.uniform_
    seen = []

    def builder(*args: object, **kwargs: object) -> nn.Module:
        seen.append(nn.Module.register_parameter is register and torch.Tensor.uniform_ is uniform)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    monkeypatch.setattr(torchvision.models, "get_model_builder", lambda name: builder)
    model = build_on_meta(Source("torchvision:resnet18"))
    assert seen == [True]
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize("name", ["resnet18", "swin_t", "vit_b_16", "convnext_tiny"])
def test_parameters_take_no_memory(name: str) -> None:
    source = Source(f"torchvision:{name}")
    on_meta = build_on_meta(source)
    total = sum(parameter.numel() for parameter in on_meta.parameters())
    real = sum(parameter.numel() for parameter in on_meta.parameters() if not parameter.is_meta)
    assert real < total / 100
    assert [(n, p.shape) for n, p in on_meta.named_parameters()] == [
        (n, p.shape) for n, p in torchvision.models.get_model(name, weights=None).named_parameters()
    ]


def test_published_weights_are_given_to_one_builder_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision reads with ``weights_only=False``; nobody else's call of ``get_state_dict`` may change for that."""
    weights = torchvision.models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
    own = WeightsEnum.get_state_dict
    torch.manual_seed(0)
    state = torchvision.models.shufflenet_v2_x0_5(weights=None).state_dict()

    def fetch(url: str, **options: object) -> dict[str, torch.Tensor]:
        assert WeightsEnum.get_state_dict is own
        assert url == weights.url
        return state

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    for model in (
        build_published("shufflenet_v2_x0_5", weights),
        build_published("shufflenet_v2_x0_5", weights, state),
    ):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
