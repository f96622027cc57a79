"""Conditional layers: which mixture of its experts each sample gets. (``ops`` computes the convolution.)"""

from condconv_surgery.layers.autotune import autotune
from condconv_surgery.layers.condconv import CondConv2d
from condconv_surgery.layers.conditional import ConditionalConv2d
from condconv_surgery.layers.conditional_linear import ConditionalLinear
from condconv_surgery.layers.dynamicconv import DynamicConv2d
from condconv_surgery.layers.equivalent_layers import conditional_like, plain_like
from condconv_surgery.layers.find_layers import conditional_layers, routers, set_temperature
from condconv_surgery.layers.odconv import ODConv2d
from condconv_surgery.layers.routed_block import RoutedBlock, routed_blocks
from condconv_surgery.layers.router_base import Router, router_for
from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.mixture import Mixture

__all__ = [
    "CondConv2d",
    "ConditionalConv2d",
    "ConditionalLinear",
    "ConvGeometry",
    "DynamicConv2d",
    "Mixture",
    "ODConv2d",
    "RoutedBlock",
    "Router",
    "autotune",
    "conditional_layers",
    "conditional_like",
    "plain_like",
    "routed_blocks",
    "router_for",
    "routers",
    "set_temperature",
]
