"""Classifiers that return probabilities, alone or beside their logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condconv_surgery.models.classifier_logits import logits_of
from condconv_surgery.recipe import InputSpec
from condconv_surgery.training import Batch, distillation_loss, evaluate
from condconv_surgery.training.classifier_heads import probability_notes


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
    notes = probability_notes(model, InputSpec(height=8, width=8))
    assert "".join(notes).startswith(note)
    assert bool(notes) == bool(note)
