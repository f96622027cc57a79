"""Fine-tuning: ``finetune`` runs it on an image folder; the other functions are for your own training loop.

>>> import torch, torchvision
>>> from condconv_surgery.recipe.training_sections import OptimizerOptions, ScheduleOptions
>>> from condconv_surgery.training import Batch, apply_schedule, evaluate, parameter_groups, train_step
>>> model = torchvision.models.mobilenet_v3_small(num_classes=3).train()
>>> optimizer = torch.optim.AdamW(parameter_groups(model, OptimizerOptions(lr=1e-3)))
>>> batches = [Batch(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])) for _ in range(2)]
>>> for step, batch in enumerate(batches):
...     factor = apply_schedule(model, optimizer, step, len(batches), ScheduleOptions(temperature=30.0))
...     outcome = train_step(model, optimizer, [batch], clip_norm=1.0)
>>> outcome.tally.count, evaluate(model, batches).count
(4.0, 8.0)
"""

from condconv_surgery.data.image_dataset import Batch
from condconv_surgery.training.batch_norm import recalibrate
from condconv_surgery.training.batches.augmentation import training_transform
from condconv_surgery.training.classifier_heads import fit_heads
from condconv_surgery.training.distillation import distillation_loss, feature_loss
from condconv_surgery.training.evaluation import evaluate
from condconv_surgery.training.finetuning import finetune
from condconv_surgery.training.gate_regularization import ExpertDropout, GateRecorder, balance_loss, sharpness_loss
from condconv_surgery.training.optimization.parameter_groups import parameter_groups, routing_parameters
from condconv_surgery.training.schedule import apply_schedule, lr_factor, temperature_at
from condconv_surgery.training.state.progress import TrainingResult
from condconv_surgery.training.step import train_step
from condconv_surgery.training.tally import Tally

__all__ = [
    "Batch",
    "ExpertDropout",
    "GateRecorder",
    "Tally",
    "TrainingResult",
    "apply_schedule",
    "balance_loss",
    "distillation_loss",
    "evaluate",
    "feature_loss",
    "finetune",
    "fit_heads",
    "lr_factor",
    "parameter_groups",
    "recalibrate",
    "routing_parameters",
    "sharpness_loss",
    "temperature_at",
    "train_step",
    "training_transform",
]
