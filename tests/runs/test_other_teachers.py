"""A teacher that was trained with another normalisation, or whose logits have another order than the student's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.models.preprocess import EvaluationTransform
from condconv_surgery.recipe import InputSpec, Recipe, attach_recipe
from condconv_surgery.recipe.training_sections import DistillOptions
from condconv_surgery.training.distillation import Teacher, class_order, distillation_loss, renormalisation
from tests.images import find_training_images, write_images
from tests.small_networks import small_net
from tests.training.test_training_run import options_for

HALVES = InputSpec(height=16, width=16, mean=(0.5, 0.4, 0.5), std=(0.5, 0.5, 0.4))
OURS = InputSpec(height=16, width=16)


def network(spec: InputSpec, classes: tuple[str, ...], seed: int = 0) -> nn.Module:
    model = small_net(classes=len(classes) or 3, seed=seed).eval()
    attach_recipe(model, Recipe(input=spec, classes=classes))
    return model


def taught(teacher: nn.Module, student: nn.Module, images: Tensor, logits: Tensor) -> Tensor:
    on_logits, _ = Teacher(teacher, student, DistillOptions(teacher="file", temperature=2.0)).loss(images, logits)
    return on_logits


def test_a_teacher_gets_the_images_as_it_was_trained(tmp_path: Path) -> None:
    """The images of a folder, prepared for the student, are those that the teacher's own preprocessing makes."""
    train, _ = find_training_images(write_images(tmp_path / "data"))
    ours, its = (torch.stack([EvaluationTransform(spec)(train.decode(i)) for i in range(4)]) for spec in (OURS, HALVES))
    teacher, student = network(HALVES, ()), network(OURS, ())
    seen: list[Tensor] = []
    teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits = torch.randn(4, 3)
    loss = taught(teacher, student, ours, logits)
    torch.testing.assert_close(seen[0], its)
    torch.testing.assert_close(loss, distillation_loss(logits, teacher(its), 2.0))


@pytest.mark.parametrize("classes", [("b", "c", "a"), ("c", "d", "a", "b")], ids=["reordered", "more"])
def test_logits_of_the_same_classes_are_compared(classes: tuple[str, ...]) -> None:
    teacher, student = network(OURS, classes), network(OURS, ("a", "b", "c"))
    images, logits = torch.randn(4, 3, 16, 16), torch.randn(4, 3)
    expected = torch.stack([teacher(images)[:, classes.index(name)] for name in "abc"], 1)
    torch.testing.assert_close(taught(teacher, student, images, logits), distillation_loss(logits, expected, 2.0))


def test_a_teacher_of_equal_or_unknown_form_is_left_alone() -> None:
    """Its images are then the very tensor that the student got."""
    assert renormalisation(OURS, InputSpec()) is None
    assert renormalisation(OURS, InputSpec(channels=1)) is None
    assert class_order(("a", "b"), ("a", "b")) is None
    assert class_order(("a", "b"), ()) is None
    for teacher, student in ((network(OURS, ("a",)), network(OURS, ("a",))), (small_net(), network(HALVES, ("a",)))):
        it = Teacher(teacher, student, DistillOptions(teacher="file"))
        assert (it.scaling, it.order) == (None, None)


def test_a_teacher_without_the_classes_of_the_images_is_refused(tmp_path: Path) -> None:
    """Before the first step; a teacher of feature maps alone may have any classes."""
    folder = write_images(tmp_path / "data", each=5)
    cs.save(network(OURS, ("class0", "class2", "other")), tmp_path / "teacher.safetensors")
    options = options_for(folder, epochs=1).updated(
        {"trust": ["tests"], "distill": {"teacher": str(tmp_path / "teacher.safetensors"), "features": ["stem"]}}
    )
    with pytest.raises(InputError, match=r"not have the classes class1\.(.|\n)*teacher's are class0, class2, other"):
        cs.finetune(small_net(classes=3), options)
    changes = {"distill": {"weight": 0.0, "feature_weight": 1.0}}
    assert cs.finetune(small_net(classes=3), options.updated(changes)).epochs == 1


def test_a_run_goes_on_where_its_teacher_has_moved_but_not_with_another(tmp_path: Path) -> None:
    """The folder of a project moves as a whole; the state knows the teacher by its weights."""
    classes = ("class0", "class1", "class2")
    before, after = tmp_path / "before.safetensors", tmp_path / "after.safetensors"
    cs.save(network(OURS, classes, seed=1), before)
    options = options_for(write_images(tmp_path / "data", each=5), epochs=1).updated({"trust": ["tests"]})
    cs.finetune(small_net(classes=3), options.updated({"distill": {"teacher": str(before)}}))
    before.rename(after)
    moved = options.updated({"distill": {"teacher": str(after)}, "schedule": {"epochs": 2}})
    assert cs.finetune(small_net(classes=3), moved, resume=True).epochs == 2
    cs.save(network(OURS, classes, seed=2), after)
    with pytest.raises(InputError, match=rf"The teacher {after} is not the one .* its weights are others\."):
        cs.finetune(small_net(classes=3), moved, resume=True)
