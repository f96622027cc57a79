"""Deployment: a trained conditional network in the form in which it is served."""

from condconv_surgery.deploy.collapse_mixtures import Collapse, LayerPlan, collapse
from condconv_surgery.deploy.export_model import Export, export
from condconv_surgery.deploy.fold_batch_norm import Folding, fold

__all__ = ["Collapse", "Export", "Folding", "LayerPlan", "collapse", "export", "fold"]
