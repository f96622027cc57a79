"""Reports: numbers first, pictures last."""

from condconv_surgery.reporting.full_report import Report, report, write_page
from condconv_surgery.reporting.measure.comparison import Comparison
from condconv_surgery.reporting.measure.expert_similarity import Experts
from condconv_surgery.reporting.measure.latency import Latency
from condconv_surgery.reporting.measure.model_profile import CONVENTION, Layer, Macs, Profile
from condconv_surgery.reporting.measure.profile_model import profile
from condconv_surgery.reporting.measure.recorded_scores import recorded_accuracy
from condconv_surgery.reporting.measure.routing_statistics import LayerRouting, Routing
from condconv_surgery.reporting.measure.run_cost import Cost, Peak

__all__ = [
    "CONVENTION",
    "Comparison",
    "Cost",
    "Experts",
    "Latency",
    "Layer",
    "LayerRouting",
    "Macs",
    "Peak",
    "Profile",
    "Report",
    "Routing",
    "profile",
    "recorded_accuracy",
    "report",
    "write_page",
]
