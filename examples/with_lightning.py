"""Fine-tune a converted model with Lightning (`pip install lightning`):

    condconv convert torchvision:resnet18 --experts 4 -o converted.safetensors
    python examples/with_lightning.py converted.safetensors FOLDER tuned.safetensors [EPOCHS]

FOLDER/CLASS/*.png, for instance as examples/digits.py writes it. Lightning runs the loop; the parameter groups, the
schedule of rate and temperature and the regulariser are those of `condconv finetune`.
"""

import sys

import lightning.pytorch as lightning
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import condconv_surgery as cs
from condconv_surgery.recipe import InputSpec
from condconv_surgery.recipe.training_sections import AugmentOptions, OptimizerOptions, ScheduleOptions
from condconv_surgery.training import (
    GateRecorder,
    apply_schedule,
    balance_loss,
    fit_heads,
    parameter_groups,
    training_transform,
)


class FineTuning(lightning.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.gates = GateRecorder(model)
        self.schedule = ScheduleOptions(warmup=0.1, temperature=30.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameter_groups(self.model, OptimizerOptions(lr=1e-3)))

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        steps = int(self.trainer.estimated_stepping_batches)
        apply_schedule(self.model, self.optimizers().optimizer, self.global_step, steps, self.schedule)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        loss = cross_entropy(self.model(images), labels)
        loss = loss + 0.1 * sum(balance_loss(gate) for gate in self.gates.take().values())
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_train_end(self) -> None:
        self.gates.close()


def main(source: str, folder: str, output: str, epochs: int = 2) -> None:
    lightning.seed_everything(0, verbose=False)
    spec = InputSpec(height=64, width=64)
    images = ImageFolder(folder, training_transform(spec, AugmentOptions(crop=(0.7, 1.0), flip=0.0)))
    model = cs.load(source).train()
    fit_heads(model, tuple(images.classes), spec)  # a new last layer where there are other classes
    trainer = lightning.Trainer(max_epochs=epochs, gradient_clip_val=1.0, logger=False, enable_checkpointing=False)
    trainer.fit(FineTuning(model), DataLoader(images, batch_size=16, shuffle=True, drop_last=True))
    if trainer.is_global_zero:
        cs.save(model, output)


if __name__ == "__main__":
    main(*sys.argv[1:4], epochs=int(sys.argv[4]) if len(sys.argv) > 4 else 2)
