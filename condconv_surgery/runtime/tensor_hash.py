"""SHA-256 of named tensors: the identity of a model's weights, and the check that a file holds what was written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def hash_weights(model: nn.Module) -> str:
    """The hash of the model's state dict, which an artifact stores to say what it was made from.

    Extra states that are no tensors, and tensors whose bytes are not their values (sparse, quantised), do not count.
    """
    state = model.state_dict()
    return hash_tensors({name: value for name, value in state.items() if is_plain_tensor(value)})


def is_plain_tensor(value: object) -> bool:
    """Whether it is a tensor whose bytes are its values: neither sparse nor quantised."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


def hash_tensors(tensors: Mapping[str, Tensor], *, prefix: str = "", headers: bool = True) -> str:
    """SHA-256 over the tensors in the order of their names, as hexadecimal text.

    headers: hash name, dtype and shape of each tensor before its bytes. prefix: text to hash first.
    Tensors on the meta device have no bytes and count by their header alone.
    """
    digest = hashlib.sha256(prefix.encode())
    for name, tensor in sorted(tensors.items()):
        if headers:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        if tensor.numel() and not tensor.is_meta:
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
