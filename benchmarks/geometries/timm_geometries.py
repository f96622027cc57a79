"""A set of convolution geometries drawn by a seed from all families of timm, every kind with an equal share."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import replace

import torch

from benchmarks.geometries.model_geometries import Site, calls_of_convolutions
from condconv_surgery.layers import ConvGeometry
from condconv_surgery.layers.conv2d_subclasses import geometry_of

MAX_MACS = 250_000_000
"""Of one image: larger layers would take most of the time of a measurement, and look like these."""

MAX_PIXELS = 256
"""Models of larger images are drawn at this side where they allow it."""


def drawn_sites(count: int, seed: int) -> list[Site]:
    """Distinct convolutions, one model of each family; kinds in turns, so that rare ones are there too."""
    choose = random.Random(seed)
    by_kind: defaultdict[str, dict[str, Site]] = defaultdict(dict)
    for model in _a_model_of_each_family(choose):
        for site in _sites_of(model):
            if site.macs <= MAX_MACS:
                by_kind[kind_of(site.geometry)].setdefault(str(site).removeprefix(site.model), site)
    pools = [list(by_kind[kind].values()) for kind in sorted(by_kind)]
    for pool in pools:
        choose.shuffle(pool)
    found: list[Site] = []
    while any(pools) and len(found) < count:
        found += [pool.pop() for pool in pools if pool]
    return found[:count]


def kind_of(geometry: ConvGeometry) -> str:
    """What decides how a layer is computed: groups, size of the kernel, stride and dilation."""
    what = "depthwise" if geometry.depthwise else "grouped" if geometry.groups > 1 else "dense"
    kh, kw = geometry.kernel_size
    size = f"{kh}x{kw}" if kh == kw and kh in (1, 3, 5, 7) else "even" if kh == kw and kh % 2 == 0 else "other"
    strided, dilated = max(geometry.stride) > 1, max(geometry.dilation) > 1
    return f"{what} {size}{' strided' if strided else ''}{' dilated' if dilated else ''}"


def _a_model_of_each_family(choose: random.Random) -> list[str]:
    import timm
    from timm.models import is_model_pretrained, list_modules

    names = []
    for family in sorted(list_modules()):
        models = sorted(timm.list_models(module=family))
        names.append(choose.choice([m for m in models if is_model_pretrained(m)] or models))
    return names


def _sites_of(name: str) -> list[Site]:
    """The distinct convolutions with zero padding of a model of timm."""
    import timm

    try:
        with torch.device("meta"):
            model = timm.create_model(name).eval()
        side = model.default_cfg["input_size"][-1]
        fixed = model.default_cfg.get("fixed_input_size")
        calls = calls_of_convolutions(model, side if fixed else min(side, MAX_PIXELS))
    except (RuntimeError, NotImplementedError, AssertionError, ValueError, TypeError, KeyError):
        return []  # a model that looks at values, or at a size of its own, has none on the meta device
    zeros = [(conv, size) for conv, size in calls if conv.padding_mode == "zeros"]
    counts = Counter((_padded_alike(geometry_of(conv)), size) for conv, size in zeros)
    return [Site(name, geometry, size, count) for (geometry, size), count in counts.items()]


def _padded_alike(geometry: ConvGeometry) -> ConvGeometry:
    """With the same padding on both sides, which every contender takes, instead of TensorFlow's."""
    if not isinstance(geometry.padding, str) and len(geometry.padding) == 2:
        return geometry
    high, wide = (d * (k - 1) // 2 for d, k in zip(geometry.dilation, geometry.kernel_size, strict=True))
    return replace(geometry, padding=(high, wide))
