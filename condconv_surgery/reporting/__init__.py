"""Reports: numbers first, pictures last."""

from condconv_surgery.reporting.model_profile import CONVENTION, Layer, Macs, Profile
from condconv_surgery.reporting.profile import profile
from condconv_surgery.reporting.reports import Report, report

__all__ = ["CONVENTION", "Layer", "Macs", "Profile", "Report", "profile", "report"]
