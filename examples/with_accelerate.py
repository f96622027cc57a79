"""Fine-tune a converted model in your own loop, with Hugging Face Accelerate (`pip install accelerate`):

    condconv convert torchvision:resnet18 --experts 4 -o converted.safetensors
    accelerate launch examples/with_accelerate.py converted.safetensors FOLDER tuned.safetensors [EPOCHS]

FOLDER/CLASS/*.png, for instance as examples/digits.py writes it. Accelerate places, wraps and distributes; the
parameter groups, the schedule of rate and temperature and the regulariser are those of `condconv finetune`.
"""

import sys

import torch
from accelerate import Accelerator
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


def main(source: str, folder: str, output: str, epochs: int = 2) -> None:
    torch.manual_seed(0)
    accelerator = Accelerator()
    spec = InputSpec(height=64, width=64)
    images = ImageFolder(folder, training_transform(spec, AugmentOptions(crop=(0.7, 1.0), flip=0.0)))
    model = cs.load(source).train()
    fit_heads(model, tuple(images.classes), spec)  # a new last layer where there are other classes
    optimizer = torch.optim.AdamW(parameter_groups(model, OptimizerOptions(lr=1e-3)))
    loader = DataLoader(images, batch_size=16, shuffle=True, drop_last=True)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    schedule, steps = ScheduleOptions(warmup=0.1, temperature=30.0), epochs * len(loader)
    gates = GateRecorder(model)
    step = 0
    for epoch in range(epochs):
        for images, labels in loader:
            apply_schedule(model, optimizer, step, steps, schedule)
            loss = cross_entropy(wrapped(images), labels)
            loss = loss + 0.1 * sum(balance_loss(gate) for gate in gates.take().values())
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
            optimizer.step()
            step += 1
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.4f}")
    gates.close()
    if accelerator.is_main_process:
        cs.save(accelerator.unwrap_model(wrapped), output)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:4], epochs=int(sys.argv[4]) if len(sys.argv) > 4 else 2)
