"""The ordered list of backends, and the only place that asks them. The first one that supports a call computes it.

A small layer takes tens of microseconds, so for each optional method of ``Backend`` there is a list of those that
override it: no backend is asked for what it does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from condconv_surgery.ops.backends.backend_protocol import Backend
from condconv_surgery.ops.backends.cpp import load_kernels
from condconv_surgery.ops.backends.cpp.cpp_backend import CppBackend
from condconv_surgery.ops.backends.eager import EagerBackend
from condconv_surgery.ops.backends.triton.triton_backend import TritonBackend
from condconv_surgery.ops.geometry import ConvArguments, ConvGeometry
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.router_forms import RouterForm, WholeForm

_backends: list[Backend] = [CppBackend(), TritonBackend(), EagerBackend()]

_fast_layer: list[Callable[..., Any]] = []
_fast_convolve: list[Callable[..., Any]] = []
_fast_rounded: list[Callable[..., Any]] = []
_applies_scales: list[Callable[..., Any]] = []
_preferred: list[Callable[..., Any]] = []
_pool: list[Callable[..., Any]] = []
_route: list[Callable[..., Any]] = []


def register_backend(backend: Backend) -> None:
    """Add a backend, which is asked before those that are registered already."""
    _backends.insert(0, backend)
    _list_methods()


def unregister_backend(backend: Backend) -> None:
    """Undo ``register_backend``."""
    _backends.remove(backend)
    _list_methods()


def _list_methods() -> None:
    lists = {
        "fast_layer": _fast_layer,
        "fast_convolve": _fast_convolve,
        "fast_rounded": _fast_rounded,
        "applies_scales": _applies_scales,
        "preferred_implementation": _preferred,
        "pool": _pool,
        "route": _route,
    }
    for name, methods in lists.items():
        default = getattr(Backend, name)
        methods[:] = [getattr(b, name) for b in _backends if getattr(type(b), name) is not default]


_list_methods()
load_kernels.enable_by_default()


def backend_for(
    x: Tensor,
    experts: Tensor,
    mixture: Mixture,
    geometry: ConvGeometry | ConvArguments,
    with_kernels: bool = False,
) -> Backend:
    """The backend of ``blockwise`` for this call: eager torch supports every one.

    with_kernels: only one that ``accepts_kernels``.
    """
    for backend in _backends:
        if (backend.accepts_kernels or not with_kernels) and backend.supports(x, experts, mixture, geometry):
            return backend
    raise AssertionError("EagerBackend supports every call")


def fast_layer(
    x: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    form: WholeForm,
    geometry: ConvGeometry,
    scales: Tensor | None = None,
) -> Tensor | None:
    """A whole layer by a backend's fast path, [B, O, H', W'], or None. form, scales: as in ``Backend.fast_layer``."""
    for method in _fast_layer:
        y: Tensor | None = method(x, experts, bias, form, geometry, scales)
        if y is not None:
            return y
    return None


def fast_convolve(
    implementation: str, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry
) -> Tensor | None:
    """The convolution by a backend's fast path, [B, O, H', W'], or None."""
    for method in _fast_convolve:
        y: Tensor | None = method(implementation, x, experts, mixture, geometry)
        if y is not None:
            return y
    return None


def fast_rounded(
    x: Tensor, experts: Tensor, scales: Tensor | None, mixture: Mixture, geometry: ConvGeometry
) -> Tensor | None:
    """The convolution with rounded experts by a backend's fast path, [B, O, H', W'], or None."""
    for method in _fast_rounded:
        y: Tensor | None = method(x, experts, scales, mixture, geometry)
        if y is not None:
            return y
    return None


def applies_scales(implementation: str, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> bool:
    """Whether a backend takes the scales of ``mixture`` into the kernels of ``implementation``."""
    for method in _applies_scales:  # noqa: SIM110  a generator costs a microsecond
        if method(implementation, x, experts, mixture, geometry):
            return True
    return False


def preferred_implementation(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> str | None:
    """The implementation that a backend asks for instead of the cost model's, or None."""
    for method in _preferred:
        name: str | None = method(x, experts, mixture, geometry)
        if name is not None:
            return name
    return None


def pool(x: Tensor) -> Tensor:
    """The mean over positions, [B, I, H, W] -> [B, I]."""
    for method in _pool:
        pooled: Tensor | None = method(x)
        if pooled is not None:
            return pooled
    raise AssertionError("EagerBackend pools every tensor")


def route(pooled: Tensor, form: RouterForm) -> list[Tensor | None] | None:
    """The outputs of a router for ``pooled`` [B, I] by a backend that fuses it, or None: compute them with torch."""
    for method in _route:
        parts: list[Tensor | None] | None = method(pooled, form)
        if parts is not None:
            return parts
    return None
