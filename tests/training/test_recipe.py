"""The standard recipe: optimizers, averages, mixing, precision, memory; and a teacher."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from condconv_surgery.data.image_dataset import Batch
from condconv_surgery.errors import InputError, TrainingError
from condconv_surgery.models.classifier_logits import Logits
from condconv_surgery.recipe import CondConv, InputSpec, TrainingOptions
from condconv_surgery.recipe.training_sections import AugmentOptions, OptimizerOptions, ScheduleOptions
from condconv_surgery.training.batches.augmentation import batch_mix, training_transform
from condconv_surgery.training.distillation import distillation_loss
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.gradient_checkpointing import checkpoint_blocks, uncheckpoint
from condconv_surgery.training.learner import Learner
from condconv_surgery.training.monitor.nonfinite import first_nonfinite, first_nonfinite_gradient
from condconv_surgery.training.objective import balanced_weights, classification_loss
from condconv_surgery.training.optimization.optimizers import OPTIMIZERS, make_optimizer
from condconv_surgery.training.optimization.weight_average import decay_at
from condconv_surgery.training.schedule import lr_factor
from condconv_surgery.training.state.run_state import read_state, save_state
from tests.small_networks import small_net

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCH = Batch(X, torch.arange(8) % 5)


def learner(model: nn.Module, **sections: object) -> Learner:
    return Learner(model, TrainingOptions().updated(dict(sections)), World(), [2] * 5, {})


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_steps_and_goes_on_from_its_state(name: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    sections = {"optimizer": {"name": name, "lr": 0.01}, "engine": {"ema": 0.5}}
    whole = learner(small_net(CondConv(experts=2)), **sections)
    for step in range(4):
        whole.step([BATCH], step, 4)
    first = learner(small_net(CondConv(experts=2)), **sections)
    for step in range(2):
        first.step([BATCH], step, 4)
    save_state(tmp_path, first.state({}))
    second = learner(small_net(CondConv(experts=2), seed=9), **sections)
    second.restore(read_state(tmp_path / "state.safetensors"))
    for step in (2, 3):
        second.step([BATCH], step, 4)
    for a, b in ((whole.model, second.model), (whole.scored, second.scored)):
        assert [n for n, t in a.state_dict().items() if not torch.equal(t, b.state_dict()[n])] == []
    start = small_net(CondConv(experts=2)).state_dict()
    assert not torch.equal(start["stem.weight"], whole.model.state_dict()["stem.weight"])


def test_an_unknown_optimizer_lists_the_nearest() -> None:
    with pytest.raises(InputError, match=r"Unknown optimizer 'adamv'\.\n.*adam, "):
        make_optimizer(small_net(), OptimizerOptions(name="adamv"))


def test_step_and_constant_schedules_agree_with_torch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    torch_steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[3 * 5, 6 * 5], gamma=0.1)
    options = ScheduleOptions(shape="step", epochs=10, milestones=(3, 6), warmup=0.0)
    for step in range(50):
        assert lr_factor(step, 50, options) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        torch_steps.step()
    assert lr_factor(49, 50, ScheduleOptions(shape="constant")) == 1.0


def test_an_average_takes_in_each_step_with_its_decay() -> None:
    model = small_net(dropout=0.0)
    it = learner(model, engine={"ema": 0.75}, optimizer={"lr": 0.1}, schedule={"warmup": 0.0})
    expected = None
    for step in range(4):
        it.step([BATCH], step, 4)
        now = model.head.weight.detach().clone()
        decay = decay_at(step, 0.75)
        expected = now if expected is None else decay * expected + (1 - decay) * now
    torch.testing.assert_close(it.scored.head.weight, expected)  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixing_gives_shares_and_trains(options: dict[str, float]) -> None:
    mix = batch_mix(AugmentOptions(**options), 5)
    assert mix is not None
    images, target = mix(X, BATCH.labels)
    assert images.shape == X.shape
    torch.testing.assert_close(target.sum(1), torch.ones(8))
    tally = learner(small_net(), augment=options).step([BATCH], 0, 1)
    assert tally.count == 8
    assert batch_mix(AugmentOptions(), 5) is None


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
def test_policies_and_erasing(policy: str) -> None:
    from PIL import Image

    image = Image.radial_gradient("L").convert("RGB")
    spec = InputSpec(height=32, width=32)
    plain = training_transform(spec, AugmentOptions(crop=(1.0, 1.0), flip=0.0))
    other = training_transform(spec, AugmentOptions(crop=(1.0, 1.0), flip=0.0, policy=policy, erasing=1.0))
    torch.manual_seed(3)
    one = other(image)
    torch.manual_seed(3)
    again = other(image)
    assert torch.equal(one, again)
    assert one.shape == (3, 32, 32)
    assert not torch.equal(one, plain(image))


def test_class_weights_make_classes_count_alike() -> None:
    weights = balanced_weights([10, 30])
    torch.testing.assert_close(weights * torch.tensor([10.0, 30.0]), torch.tensor([20.0, 20.0]))
    logits, labels = torch.randn(6, 2), torch.tensor([0, 1, 1, 0, 1, 1])
    expected = F.cross_entropy(logits, labels, weight=weights)
    torch.testing.assert_close(classification_loss(Logits(logits), labels, 0.0, weights), expected)


def test_weighted_parts_step_as_one_batch() -> None:
    """Parts of unlike classes: a mean of their weighted means would be another step."""
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 3, 4])
    models = [small_net(CondConv(experts=2), norm=False, dropout=0.0) for _ in range(2)]
    for model, parts in zip(models, ([slice(0, 8)], [slice(0, 4), slice(4, 8)]), strict=True):
        sections = {"optimizer": {"name": "sgd", "lr": 1.0, "class_weights": True}, "schedule": {"warmup": 0.0}}
        it = Learner(model, TrainingOptions().updated(sections), World(), [40, 10, 10, 10, 10], {})
        tally = it.step([Batch(X[part], labels[part]) for part in parts], 0, 4)
        assert tally.count == 8
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_a_compiled_model_steps_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through dynamo and autograd's tracing; without the code generator, which needs a compiler and a minute."""
    compiled: list[nn.Module] = []

    def compile_(model: nn.Module) -> object:
        compiled.append(model)
        return original(model, backend="aot_eager")

    original = torch.compile
    monkeypatch.setattr(torch, "compile", compile_)
    models = [small_net(CondConv(experts=2), dropout=0.0) for _ in range(2)]
    for model, on in zip(models, (False, True), strict=True):
        # not Adam: a bias before a batch norm has a gradient of rounding noise, and Adam makes a full step of it
        it = learner(model, engine={"compile": on}, optimizer={"name": "sgd", "lr": 0.1})
        for step in range(2):
            it.step([BATCH], step, 4)
    assert compiled == [models[1]]
    for name, tensor in models[0].state_dict().items():
        torch.testing.assert_close(tensor, models[1].state_dict()[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_steps_are_near_full_ones(precision: str) -> None:
    models = [small_net(CondConv(experts=2), dropout=0.0) for _ in range(2)]
    for model, name in zip(models, ("fp32", precision), strict=True):
        it = learner(model, engine={"precision": name}, optimizer={"name": "sgd", "lr": 0.1}, schedule={"warmup": 0.0})
        it.step([BATCH], 0, 4)
    full, low = (m.stem.weight.detach() for m in models)
    torch.testing.assert_close(full, low, atol=2e-3, rtol=0.05)
    assert low.dtype == torch.float32


def test_loss_scaling_skips_an_overflow_and_its_statistics() -> None:
    model = small_net()
    it = learner(model, engine={"precision": "fp16"})
    before = copy.deepcopy(model.state_dict())
    scale = it.scaler.get_scale()  # type: ignore[union-attr]
    tally = it.step([Batch(X * 1e6, BATCH.labels)], 0, 2)
    assert tally.count == 0
    assert [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])] == []
    assert it.scaler.get_scale() < scale  # type: ignore[union-attr]
    for step in range(1, 100):
        it.step([Batch(X * 1e6, BATCH.labels)], step, 200)
    with pytest.raises(TrainingError, match=r'skipped 101 steps in a row.*\n.*\n.*engine\.precision="bf16"'):
        it.step([Batch(X * 1e6, BATCH.labels)], 100, 200)


def test_checkpointing_gives_the_same_gradients_and_statistics() -> None:
    def gradients(checkpointed: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        model = nn.Sequential(nn.Sequential(block, nn.Conv2d(4, 5, 3)), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        model = nn.ModuleDict({"features": model})["features"]
        blocks = checkpoint_blocks(nn.ModuleDict({"all": model})) if checkpointed else []
        assert len(blocks) == checkpointed
        torch.manual_seed(1)
        F.cross_entropy(model(X), BATCH.labels).backward()
        uncheckpoint(blocks)
        assert "forward" not in block.__dict__
        return {n: p.grad for n, p in model.named_parameters()} | dict(model.named_buffers())  # type: ignore[return-value]

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], msg=name)


def test_checkpointing_steps_as_without_in_a_learner() -> None:
    import torchvision

    results = []
    for on in (False, True):
        torch.manual_seed(0)
        model = torchvision.models.resnet18(num_classes=5)
        it = learner(model, engine={"checkpointing": on})
        assert len(it.blocks) == 8 * on
        it.step([Batch(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)), BATCH.labels[:4])], 0, 1)
        results.append(model.state_dict())
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], msg=name)


def test_channels_last_steps_alike() -> None:
    models = [small_net(CondConv(experts=2)) for _ in range(2)]
    for model, on in zip(models, (False, True), strict=True):
        learner(model, engine={"channels_last": on}).step([BATCH], 0, 2)
    assert models[1].stem.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(models[0].stem.weight, models[1].stem.weight.contiguous(), atol=1e-5, rtol=1e-4)


def test_synchronised_statistics_need_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    with pytest.raises(InputError, match="sync_batch_norm=True on a CPU"):
        learner(small_net(), engine={"sync_batch_norm": True})


def test_the_first_place_that_is_not_finite_is_named() -> None:
    model = small_net(dropout=0.0)
    assert first_nonfinite(model, [X * float("nan")]) == "the images themselves"
    assert first_nonfinite(model, [X]) is None
    model.stem.weight.data *= 100
    assert first_nonfinite(model, [X.abs() / X.abs().max() * 3e38]) == "the output of stem (Conv2d)"
    model.inner.weight.data[0, 0] = float("inf")  # type: ignore[index, union-attr]
    assert first_nonfinite(model, [X]) == "the weights inner.weight"
    model.zero_grad()
    model.stem.weight.grad = torch.full_like(model.stem.weight, float("nan"))
    assert first_nonfinite_gradient(model) == "the gradient of stem.weight"


@pytest.mark.parametrize("bad", [0, 1])
def test_any_part_of_a_step_may_be_the_one_that_is_not_finite(bad: int) -> None:
    parts = [BATCH, BATCH]
    parts[bad] = BATCH._replace(images=X * float("nan"))
    it = learner(small_net(), data={"batch_size": 16}, optimizer={"accumulate": 2})
    with pytest.raises(TrainingError, match="loss is not finite at step 3; first in the images themselves"):
        it.step(parts, 2, 10)


def test_an_overflow_in_what_does_not_move_skips_no_step() -> None:
    model = small_net(CondConv(experts=2))
    it = learner(model, engine={"precision": "fp16"}, layers={"warm_routers": 1}, schedule={"epochs": 2})
    model.stem.weight.register_hook(lambda grad: grad * float("inf"))  # type: ignore[union-attr]
    before = [parameter.detach().clone() for parameter in it.only or []]
    outcome = it.step([BATCH], 0, 2)
    assert outcome.count == 8
    assert it.skipped == 0
    assert not any(torch.equal(one, now) for one, now in zip(before, it.only or [], strict=True))


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights() -> None:
    model = small_net()
    it = learner(model)
    model.head.weight.register_hook(lambda grad: grad * float("nan"))
    before = model.head.weight.detach().clone()
    with pytest.raises(TrainingError, match=r"gradient is not finite at step 1; first in the gradient of head\.weight"):
        it.step([BATCH], 0, 1)
    assert torch.equal(model.head.weight, before)


def test_weights_of_half_precision_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"stem.weight is torch.bfloat16(.|\n)*trained in float32(.|\n)*model.float\(\)"
    ):
        learner(small_net().bfloat16())


def test_distillation_is_hintons() -> None:
    s, t = torch.randn(4, 6), torch.randn(4, 6)
    p, q = F.softmax(t / 3, 1), F.log_softmax(s / 3, 1)
    torch.testing.assert_close(distillation_loss(s, t, 3.0), 9 * (p * (p.log() - q)).sum(1).mean())
    assert distillation_loss(s, s, 3.0).item() == pytest.approx(0, abs=1e-6)


def test_a_teacher_alone_holds_the_model_where_it_starts() -> None:
    """With the whole weight on a teacher that is the model itself, nothing pulls it away; labels would."""

    def distance(weight: float) -> float:
        model = small_net(dropout=0.0, norm=False)
        start = model(X).detach()
        it = learner(
            model,
            distill={"teacher": "start", "weight": weight, "features": ["stem"], "feature_weight": 1.0 * weight},
            optimizer={"name": "sgd", "lr": 0.1, "weight_decay": 0.0},
            schedule={"warmup": 0.0},
        )
        for step in range(10):
            it.step([BATCH], step, 100)
        return (model(X) - start).abs().max().item()

    assert distance(1.0) < 1e-3
    assert distance(0.0) > 0.05


def test_a_teacher_of_other_classes_or_layers_is_refused() -> None:
    it = learner(small_net(), distill={"teacher": "start"})
    assert it.teacher is not None
    it.model.head = nn.Linear(8, 3)  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"has 5 classes, the images have 3.*\n.*\n.*distill\.teacher"):
        it.step([Batch(X, BATCH.labels % 3)], 0, 1)
    with pytest.raises(InputError, match=r"Unknown layer in distill\.features 'steam'"):
        learner(small_net(), distill={"teacher": "start", "features": ["steam"]})


def test_a_teacher_from_a_file_is_built_by_trusted_packages(tmp_path: Path) -> None:
    path = tmp_path / "teacher.pt"
    torch.save(small_net().half(), path)  # a whole module, of half precision
    with pytest.raises(InputError, match=r"trust=\[.tests.\]"):
        learner(small_net(), distill={"teacher": f"{path}"})
    it = learner(small_net(), trust=["tests"], distill={"teacher": f"{path}"})
    it.step([BATCH], 0, 1)
