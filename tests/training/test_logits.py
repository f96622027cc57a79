"""Classifiers that return probabilities, alone or beside their logits."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.models.classifier_logits import logits_of
from condconv_surgery.recipe import InputSpec, attach_recipe, recipe_of
from condconv_surgery.training import Batch, distillation_loss, evaluate, train_step
from condconv_surgery.training.classifier_heads import find_heads, output_notes
from tests.images import write_images


class Classifier(nn.Module):
    """of_eval, of_train: what its forward makes of the logits in each mode."""

    def __init__(self, of_eval: object, of_train: object = lambda z: z) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)
        self.of = {False: of_eval, True: of_train}

    def logits(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))

    def forward(self, x: Tensor) -> object:
        return self.of[self.training](self.logits(x))


FORMS = {
    "probabilities": lambda z: z.softmax(1),
    "probabilities and logits": lambda z: (z.softmax(1), z),
    "logits": lambda z: z,
    "logits and features": lambda z: (z, z.relu()),
}


class Embeds(Classifier):
    """Returns a projection for retrieval, [B, 16], and a feature map beside the logits."""

    def __init__(self) -> None:
        super().__init__(lambda z: z)
        self.projection = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> object:
        maps = self.conv(x).relu()
        return self.fc(maps.mean((2, 3))), self.projection(maps.mean((2, 3))), maps


def test_other_outputs_are_no_logits(tmp_path: Path) -> None:
    """They add nothing to the loss, their layers are not replaced as heads are, and a note names them."""
    model = Embeds()
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    loss = train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), [Batch(images, labels)]).tally.loss
    assert loss == pytest.approx(F.cross_entropy(model(images)[0], labels).item(), rel=1e-5)
    assert find_heads(model, InputSpec(height=8, width=8)) == ["fc"]
    assert output_notes(model, InputSpec(height=8, width=8)) == [
        "model(images)[1], [B, 16], is not of the logits' shape, [B, 3]: the loss leaves it out.",
        "model(images)[2], [B, 8, 6, 6], is not of the logits' shape, [B, 3]: the loss leaves it out.",
    ]
    before = model.projection.weight.clone()
    folder = write_images(tmp_path / "images", classes=4, each=5, side=16)
    options = {"schedule": {"epochs": 1}, "data": {"workers": 0, "image_size": 16}, "optimizer": {"weight_decay": 0}}
    assert cs.finetune(model, options, data=folder, output=tmp_path / "run").heads == {"fc": 4}
    assert torch.equal(model.projection.weight, before)


@pytest.mark.parametrize("form", FORMS)
def test_the_validation_loss_is_that_of_the_logits(form: str) -> None:
    torch.manual_seed(0)
    model = Classifier(FORMS[form])
    batches = [Batch(torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1])) for _ in range(2)]
    with torch.no_grad():
        expected = sum(float(F.cross_entropy(model.logits(b.images), b.labels, reduction="sum")) for b in batches)
    assert evaluate(model, batches).loss_sum == pytest.approx(expected, rel=1e-5)


def test_probabilities_teach_as_their_logits_do() -> None:
    student, teacher = torch.randn(6, 10), 3 * torch.randn(6, 10)
    taught = distillation_loss(student, logits_of(teacher.softmax(1)).main, 4.0)
    torch.testing.assert_close(taught, distillation_loss(student, teacher, 4.0))


def test_the_gradient_is_that_of_the_log_likelihood() -> None:
    z = torch.randn(4, 5, dtype=torch.float64)
    labels = torch.tensor([0, 1, 4, 2])
    gradients = []
    for logits in (lambda z: z, lambda z: logits_of(z.softmax(1)).main, lambda z: logits_of(z).main):
        leaf = z.clone().requires_grad_()
        F.cross_entropy(logits(leaf), labels).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    assert torch.equal(gradients[2], gradients[0])


def test_probabilities_of_zero_and_half_precision() -> None:
    certain = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    main = logits_of(certain).main
    assert main.isfinite().all()
    main.sum().backward()
    assert certain.grad.isfinite().all()
    z = torch.randn(64, 1000)
    halved = logits_of((z.softmax(1).bfloat16(), z.bfloat16())).main
    assert torch.equal(halved, z.bfloat16().float())


def test_what_only_looks_like_probabilities_stays() -> None:
    for rows in (torch.rand(4, 3), torch.tensor([[1.5, -0.5], [0.5, 0.5]]), torch.full((2, 3), float("nan"))):
        assert logits_of(rows).main.equal(rows) or rows.isnan().all()
    assert logits_of(torch.full((2, 3), float("nan"))).main.isnan().all()


@pytest.mark.parametrize(
    ("model", "note"),
    [
        (Classifier(FORMS["probabilities"]), "The model returns probabilities in eval mode: the loss takes"),
        (Classifier(*[FORMS["probabilities"]] * 2), "The model returns probabilities in eval and train mode"),
        (
            Classifier(torch.sigmoid, lambda z: z - 9),
            "The model returns a sigmoid of its logits in eval mode: the loss",
        ),
        (Classifier(FORMS["logits"]), ""),
    ],
)
def test_probabilities_are_named(model: nn.Module, note: str) -> None:
    notes = output_notes(model, InputSpec(height=8, width=8))
    assert "".join(notes).startswith(note)
    assert bool(notes) == bool(note)


class Output(OrderedDict[str, Tensor]):
    """As ``ModelOutput`` of transformers: a dict whose items are attributes too."""

    def __getattr__(self, name: str) -> Tensor:
        if name in self:
            return self[name]
        raise AttributeError(name)


FORMS_OF_OUTPUT = {
    "ModelOutput": lambda z: Output(logits=z, hidden_states=(z, z)),
    "loss first": lambda z: Output(loss=z.mean(), logits=z),
    "dict": lambda z: {"logits": z, "features": z.relu()},
    "object": lambda z: SimpleNamespace(logits=z, loss=None),
}


@pytest.mark.parametrize("form", FORMS_OF_OUTPUT.values(), ids=FORMS_OF_OUTPUT.keys())
def test_logits_may_be_an_item_or_attribute_of_the_output(form: object) -> None:
    torch.manual_seed(0)
    model = Classifier(form, form)
    batches = [Batch(torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1]))]
    with torch.no_grad():
        expected = F.cross_entropy(model.logits(batches[0].images), batches[0].labels, reduction="sum")
    assert evaluate(model, batches).loss_sum == pytest.approx(float(expected), rel=1e-5)
    assert find_heads(model, InputSpec(height=8, width=8)) == ["fc"]


def test_a_model_with_such_an_output_is_trained_reported_and_collapsed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Classifier(*[FORMS_OF_OUTPUT["loss first"]] * 2)
    folder = write_images(tmp_path / "images", classes=4, each=5, side=16)
    converted = cs.convert(model, cs.CondConv(experts=2), skip_stem=False, example=torch.randn(2, 3, 16, 16)).model
    attach_recipe(converted, replace(recipe_of(converted), input=InputSpec(height=16, width=16)))
    options = {"schedule": {"epochs": 1}, "data": {"workers": 0}}
    result = cs.finetune(converted, options, data=folder, output=tmp_path / "run")
    assert (result.heads, converted.fc.out_features) == ({"fc": 4}, 4)
    report = cs.report(converted, data=folder)
    assert report.routing.accuracy == pytest.approx(report.accuracy)
    assert cs.collapse(converted, folder).before == pytest.approx(report.accuracy)


def test_an_output_without_logits_is_named() -> None:
    with pytest.raises(InputError, match=r"output is a dict(.|\n)*output\.logits"):
        logits_of({"boxes": torch.zeros(2, 4)})
