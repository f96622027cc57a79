"""Deployment: a trained conditional network in the form in which it is served."""

from condconv_surgery.deploy.collapse_mixtures import Collapse, LayerPlan, collapse
from condconv_surgery.deploy.export_model import Export, export
from condconv_surgery.deploy.fold_batch_norm import Folding, fold
from condconv_surgery.deploy.round_experts import ExpertRounding, round_experts

__all__ = [
    "Collapse",
    "ExpertRounding",
    "Export",
    "Folding",
    "LayerPlan",
    "collapse",
    "export",
    "fold",
    "round_experts",
]
