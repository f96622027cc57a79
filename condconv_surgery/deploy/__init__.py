"""Deployment: a trained conditional network in the form in which it is served."""

from condconv_surgery.deploy.collapse_mixtures import Collapse, LayerPlan, collapse
from condconv_surgery.deploy.fold_batch_norm import Folding, fold
from condconv_surgery.deploy.onnx_export import OnnxExport, export_onnx

__all__ = ["Collapse", "Folding", "LayerPlan", "OnnxExport", "collapse", "export_onnx", "fold"]
