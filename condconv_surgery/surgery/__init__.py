"""The operation: find the convolutions of a trained model, plan, upcycle, swap, prove."""

from condconv_surgery.surgery.block_graph import BlockError
from condconv_surgery.surgery.block_routing import route_block, share_routers
from condconv_surgery.surgery.conv_sites import ConvSite, Sites, find_sites
from condconv_surgery.surgery.conversion import Conversion, convert, example_arguments, make_plan
from condconv_surgery.surgery.lift_functional import lift_convolutions
from condconv_surgery.surgery.proof import Difference, Gap
from condconv_surgery.surgery.select import Plan, Skip, select
from condconv_surgery.surgery.upcycle import upcycle

__all__ = [
    "BlockError",
    "ConvSite",
    "Conversion",
    "Difference",
    "Gap",
    "Plan",
    "Sites",
    "Skip",
    "convert",
    "example_arguments",
    "find_sites",
    "lift_convolutions",
    "make_plan",
    "route_block",
    "select",
    "share_routers",
    "upcycle",
]
