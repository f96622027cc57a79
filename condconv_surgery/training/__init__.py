"""Fine-tuning: a run from an image folder, and the pieces of it for a loop of your own."""

from condconv_surgery.training.evaluation import Tally, evaluate
from condconv_surgery.training.groups import parameter_groups
from condconv_surgery.training.heads import fit_heads
from condconv_surgery.training.progress import TrainingResult
from condconv_surgery.training.run import finetune
from condconv_surgery.training.schedule import apply_schedule, lr_factor, temperature_at

__all__ = [
    "Tally",
    "TrainingResult",
    "apply_schedule",
    "evaluate",
    "finetune",
    "fit_heads",
    "lr_factor",
    "parameter_groups",
    "temperature_at",
]
