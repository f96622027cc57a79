"""Reports: measure a model (``measure``), then render it as text, plots and pages (``render``)."""

from condconv_surgery.reporting.comparison import Comparison, write_page
from condconv_surgery.reporting.full_report import Report, report
from condconv_surgery.reporting.images.network_routing import Routing
from condconv_surgery.reporting.images.predictions import Calibration, ClassAccuracy, Predictions
from condconv_surgery.reporting.images.recorded_accuracy import RecordedAccuracy, recorded_accuracy
from condconv_surgery.reporting.images.routing_statistics import LayerRouting
from condconv_surgery.reporting.measure.cost_table import CONVENTION, Layer, Macs, Profile
from condconv_surgery.reporting.measure.expert_similarity import Experts
from condconv_surgery.reporting.measure.latency import Latency
from condconv_surgery.reporting.measure.memory_and_latency import Cost, Peak
from condconv_surgery.reporting.measure.profile import profile
from condconv_surgery.reporting.measure.provenance import Provenance
from condconv_surgery.reporting.predict_images import predict
from condconv_surgery.reporting.study.paired_difference import Difference, paired_difference
from condconv_surgery.reporting.study.study_results import ArmResult, StudyResults
from condconv_surgery.reporting.study_report import StudyReport

__all__ = [
    "CONVENTION",
    "ArmResult",
    "Calibration",
    "ClassAccuracy",
    "Comparison",
    "Cost",
    "Difference",
    "Experts",
    "Latency",
    "Layer",
    "LayerRouting",
    "Macs",
    "Peak",
    "Predictions",
    "Profile",
    "Provenance",
    "RecordedAccuracy",
    "Report",
    "Routing",
    "StudyReport",
    "StudyResults",
    "paired_difference",
    "predict",
    "profile",
    "recorded_accuracy",
    "report",
    "write_page",
]
