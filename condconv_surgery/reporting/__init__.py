"""Reports: numbers first, pictures last."""

from condconv_surgery.reporting.comparison import Comparison
from condconv_surgery.reporting.cost import Cost, Peak
from condconv_surgery.reporting.latency import Latency
from condconv_surgery.reporting.model_profile import CONVENTION, Layer, Macs, Profile
from condconv_surgery.reporting.profile import profile
from condconv_surgery.reporting.recorded import recorded_accuracy
from condconv_surgery.reporting.reports import Report, report, write_page
from condconv_surgery.reporting.routing import LayerRouting, Routing
from condconv_surgery.reporting.similarity import Experts

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
