"""Reports: measure a model (``measure``), then render it as text, plots and pages (``render``)."""

from condconv_surgery.reporting.comparison import Comparison, write_page
from condconv_surgery.reporting.full_report import Report, report
from condconv_surgery.reporting.measure.cost_table import CONVENTION, Layer, Macs, Profile
from condconv_surgery.reporting.measure.expert_similarity import Experts
from condconv_surgery.reporting.measure.latency import Latency
from condconv_surgery.reporting.measure.memory_and_latency import Cost, Peak
from condconv_surgery.reporting.measure.profile import profile
from condconv_surgery.reporting.measure.recorded_accuracy import recorded_accuracy
from condconv_surgery.reporting.measure.routing_statistics import LayerRouting, Routing
from condconv_surgery.reporting.study.paired_difference import Difference, paired_difference
from condconv_surgery.reporting.study.study_results import ArmResult, StudyResults
from condconv_surgery.reporting.study_report import StudyReport

__all__ = [
    "CONVENTION",
    "ArmResult",
    "Comparison",
    "Cost",
    "Difference",
    "Experts",
    "Latency",
    "Layer",
    "LayerRouting",
    "Macs",
    "Peak",
    "Profile",
    "Report",
    "Routing",
    "StudyReport",
    "StudyResults",
    "paired_difference",
    "profile",
    "recorded_accuracy",
    "report",
    "write_page",
]
