"""The conversion: find the convolutions of a trained model, plan, upcycle, swap, prove."""

from condconv_surgery.surgery.block_graph import BlockError
from condconv_surgery.surgery.block_routing import route_block
from condconv_surgery.surgery.carry_out import Conversion
from condconv_surgery.surgery.conversion import ModelPlan, convert, plan
from condconv_surgery.surgery.conversion_plan import Plan
from condconv_surgery.surgery.lift_functional import lift_convolutions
from condconv_surgery.surgery.proof.compare_outputs import Difference, Gap
from condconv_surgery.surgery.upcycle import upcycle

__all__ = [
    "BlockError",
    "Conversion",
    "Difference",
    "Gap",
    "ModelPlan",
    "Plan",
    "convert",
    "lift_convolutions",
    "plan",
    "route_block",
    "upcycle",
]
