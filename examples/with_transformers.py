"""Fine-tune a converted model of Hugging Face in its Trainer (`pip install transformers accelerate`):

    condconv convert transformers:FOLDER_OF_SAVE_PRETRAINED --experts 4 -o converted.safetensors
    python examples/with_transformers.py converted.safetensors FOLDER tuned.safetensors [EPOCHS]

FOLDER/CLASS/*.png, for instance as examples/digits.py writes it. The Trainer runs the loop; the parameter groups, the
schedule of rate and temperature and the regulariser are those of `condconv finetune`.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from transformers import Trainer, TrainerCallback, TrainingArguments

import condconv_surgery as cs
from condconv_surgery.recipe import recipe_of
from condconv_surgery.recipe.training_sections import AugmentOptions, OptimizerOptions, ScheduleOptions
from condconv_surgery.training import (
    GateRecorder,
    apply_schedule,
    balance_loss,
    fit_heads,
    parameter_groups,
    training_transform,
)


class Images(ImageFolder):
    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels, label = super().__getitem__(index)
        return {"pixel_values": pixels, "labels": label}


class Schedule(TrainerCallback):
    """Learning rate and temperature before each step, in place of the Trainer's own schedule."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        options = ScheduleOptions(warmup=0.1, temperature=30.0)
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])  # inside that of Accelerate
        apply_schedule(kwargs["model"], optimizer, state.global_step, state.max_steps, options)


class BalancedTrainer(Trainer):
    """The loss of the model, and that all experts are used."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.gates = GateRecorder(model)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        gates = self.gates.take().values()
        if isinstance(loss, Tensor) and self.model.training:
            loss = loss + 0.1 * sum(balance_loss(gate) for gate in gates)
        return loss


def main(source: str, folder: str, output: str, epochs: int = 2) -> None:
    torch.manual_seed(0)
    model = cs.load(source)
    spec = recipe_of(model).input
    images = Images(folder, training_transform(spec, AugmentOptions(crop=(0.7, 1.0), flip=0.0)))
    fit_heads(model, tuple(images.classes), spec)  # a new last layer where there are other classes
    optimizer = torch.optim.AdamW(parameter_groups(model, OptimizerOptions(lr=1e-3)))
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    settings = TrainingArguments(
        output_dir=f"{output}.trainer",
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        dataloader_drop_last=True,
        save_strategy="no",
        report_to="none",
    )
    trainer = BalancedTrainer(
        model, settings, train_dataset=images, optimizers=(optimizer, constant), callbacks=[Schedule()]
    )
    trainer.train()
    trainer.gates.close()
    if trainer.is_world_process_zero():
        cs.save(model, output)


if __name__ == "__main__":
    main(*sys.argv[1:4], epochs=int(sys.argv[4]) if len(sys.argv) > 4 else 2)
