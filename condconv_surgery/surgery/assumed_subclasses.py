"""Classes that the user says compute what ``nn.Conv2d`` computes (``--subclass``): which, what they hold, is it true.

A class is matched by its full name alone; nothing is imported because of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from condconv_surgery.errors import InputError, ProofError, listed, nearest, one_line
from condconv_surgery.layers.conv2d_subclasses import full_name, is_known_otherwise, is_understood
from condconv_surgery.surgery.conv_sites import ConvSite
from condconv_surgery.surgery.proof import Outputs, allowed, compare


def require_classes(names: Iterable[str], sites: Iterable[ConvSite]) -> None:
    """Raise ``InputError`` for a name that no convolution has as its class."""
    classes = sorted({full_name(type(site.module)) for site in sites if not site.linear})
    for name in names:
        if name not in classes:
            shown = nearest(name, classes) or classes[:3]
            raise InputError(
                f"--subclass {name} is the class of no convolution in the model.",
                f"The classes of its convolutions are: {listed(shown)}." if shown else "It has no convolution.",
                f"--subclass {shown[0]}" if shown else "leave it out",
            )


def what_would_be_lost(module: nn.Module) -> str:
    """What a layer holds beside weight and bias, of which its conditional twin would have nothing; empty for nothing.

    Of a class that is taken for a plain convolution at the user's word, every attribute counts that is not None.
    """
    if is_known_otherwise(type(module)):
        return ""
    slots = (module._parameters, module._buffers, module._modules)
    names = [name for slot in slots for name, value in slot.items() if value is not None]
    names = [name for name in names if name not in ("weight", "bias")]
    if _is_claimed(module):
        usual = vars(nn.Conv2d(1, 1, 1, device="meta"))
        names += [n for n, value in vars(module).items() if value is not None and n not in usual]
    return listed(names)


def unchecked(sites: Iterable[ConvSite]) -> tuple[str, ...]:
    """A note for each class whose layers would be, or were, converted at the user's word without a proof."""
    names: dict[str, list[str]] = {}
    for site in _claimed(sites):
        names.setdefault(full_name(type(site.module)), []).append(site.name)
    return tuple(f"not checked: that {cls} computes what nn.Conv2d computes ({listed(n)})" for cls, n in names.items())


@contextmanager
def checked(sites: Iterable[ConvSite]) -> Iterator[None]:
    """Inside the block, each call of a layer whose class was claimed is compared with the plain convolution.

    Raises ``ProofError`` where they differ.
    """
    handles = [
        site.module.register_forward_hook(_compare_of(site.name), with_kwargs=True, prepend=True)
        for site in _claimed(sites)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_claimed(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and not is_understood(type(module))


def _claimed(sites: Iterable[ConvSite]) -> list[ConvSite]:
    return [site for site in sites if _is_claimed(site.module)]


def _compare_of(name: str) -> Callable[..., None]:
    def compare_with_plain(module: nn.Conv2d, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        try:
            (x,) = (*args, *kwargs.values())
            expected = nn.Conv2d._conv_forward(module, x, module.weight, module.bias)
        except Exception as error:  # it takes what a convolution does not take
            raise _refuted(name, module, f"that fails ({one_line(error)})") from error
        if not isinstance(output, Tensor):
            raise _refuted(name, module, f"it gives a {type(output).__name__}")
        gap = compare(Outputs([expected], None), Outputs([output], None)).eval
        if gap is not None and not gap.absolute <= allowed([expected], None):
            raise _refuted(name, module, f"the outputs differ by {gap.absolute:.3g}")

    return compare_with_plain


def _refuted(name: str, module: nn.Module, how: str) -> ProofError:
    cls = full_name(type(module))
    return ProofError(
        f"{name} is a {cls}, which does not compute what nn.Conv2d computes: {how}.",
        "--subclass is for classes that do.",
        f"leave --subclass {cls} out",
    )
