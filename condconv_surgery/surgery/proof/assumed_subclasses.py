"""Subclasses that the user asserts are equivalent to ``nn.Conv2d`` (``subclasses=``), and the check that they are.

A class is matched by its full name alone; nothing is imported because of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condconv_surgery.errors import InputError, ProofError, listed, nearest, one_line
from condconv_surgery.layers.conv2d_subclasses import (
    constant_padding,
    full_name,
    geometry_of,
    is_known_otherwise,
    is_understood,
)
from condconv_surgery.recipe import as_argument
from condconv_surgery.runtime.modes import in_mode, without_gradients
from condconv_surgery.runtime.snapshot import preserving_state
from condconv_surgery.surgery.observe.conv_sites import ConvSite
from condconv_surgery.surgery.proof.compare_outputs import Outputs, allowed, compare


def require_classes(names: Iterable[str], sites: Iterable[ConvSite]) -> None:
    """Raise ``InputError`` for a name that no convolution has as its class."""
    classes = sorted({full_name(type(site.module)) for site in sites if not site.linear})
    for name in names:
        if name not in classes:
            shown = nearest(name, classes) or classes[:3]
            raise InputError(
                f"{as_argument('subclasses', [name])} is the class of no convolution in the model.",
                f"The classes of its convolutions are: {listed(shown)}." if shown else "It has no convolution.",
                as_argument("subclasses", shown[:1]) if shown else "subclasses=[]",
            )


def attributes_to_lose(module: nn.Module) -> str:
    """Names of what a layer holds beside weight and bias, which its replacement would not have; empty for nothing.

    For an assumed subclass, every attribute counts that ``nn.Conv2d`` has not and that is not None.
    """
    if is_known_otherwise(type(module)):
        return ""
    slots = (module._parameters, module._buffers, module._modules)
    names = [name for slot in slots for name, value in slot.items() if value is not None]
    names = [name for name in names if name not in ("weight", "bias")]
    if constant_padding(module) is not None:
        names.remove("static_padding")
    if _is_assumed(module):
        usual = vars(nn.Conv2d(1, 1, 1, device="meta"))
        names += [n for n, value in vars(module).items() if value is not None and n not in usual]
    return listed(names)


def is_equivalent(module: nn.Conv2d, shape: tuple[int, ...] | None) -> bool:
    """Whether ``module`` computes what ``nn.Conv2d`` computes, on one random input of that shape."""
    if shape is None:
        return False
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(module.weight)
    try:
        with in_mode(module, False), without_gradients(module), preserving_state(module):
            _compare_hook("")(module, (x,), {}, module(x))
    except Exception:  # whatever its forward raises
        return False
    return True


def unchecked_notes(sites: Iterable[ConvSite]) -> tuple[str, ...]:
    """A note for each assumed subclass whose layers are converted without a proof."""
    names: dict[str, list[str]] = {}
    for site in _assumed(sites):
        names.setdefault(full_name(type(site.module)), []).append(site.name)
    return tuple(f"not checked: that {cls} computes what nn.Conv2d computes ({listed(n)})" for cls, n in names.items())


@contextmanager
def checking_subclasses(sites: Iterable[ConvSite]) -> Iterator[None]:
    """Compare each call of a layer of an assumed subclass inside the block with the plain convolution.

    Raises ``ProofError`` where they differ.
    """
    handles = [
        site.module.register_forward_hook(_compare_hook(site.name), with_kwargs=True, prepend=True)
        for site in _assumed(sites)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_assumed(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and not is_understood(type(module))


def _assumed(sites: Iterable[ConvSite]) -> list[ConvSite]:
    return [site for site in sites if _is_assumed(site.module)]


def _compare_hook(name: str) -> Callable[..., None]:
    def compare_with_plain(module: nn.Conv2d, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        try:
            (x,) = (*args, *kwargs.values())
            geometry = geometry_of(module)
            padded, arguments = geometry.pad(x if x.dim() == 4 else x[None])
            expected = F.conv2d(padded, module.weight, module.bias, *arguments)
            expected = expected if x.dim() == 4 else expected[0]
        except Exception as error:  # it takes what a convolution does not take
            raise _not_equivalent(name, module, f"that fails ({one_line(error)})") from error
        if not isinstance(output, Tensor):
            raise _not_equivalent(name, module, f"it gives a {type(output).__name__}")
        gap = compare(Outputs([expected], None), Outputs([output], None)).eval
        if gap is not None and not gap.absolute <= allowed([expected], None):
            raise _not_equivalent(name, module, f"the outputs differ by {gap.absolute:.3g}")

    return compare_with_plain


def _not_equivalent(name: str, module: nn.Module, evidence: str) -> ProofError:
    cls = full_name(type(module))
    return ProofError(
        f"{name} is a {cls}, which does not compute what nn.Conv2d computes: {evidence}.",
        "subclasses= is for classes that do.",
        f"leave {as_argument('subclasses', [cls])} out",
    )
