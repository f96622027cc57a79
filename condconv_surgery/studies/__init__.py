"""Studies: does a conversion pay? The same training for several arms, and what their difference says."""

from condconv_surgery.studies.arm_costs import with_costs
from condconv_surgery.studies.quick_check import QuickCheck, quick_check
from condconv_surgery.studies.run_study import compare

__all__ = ["QuickCheck", "compare", "quick_check", "with_costs"]
