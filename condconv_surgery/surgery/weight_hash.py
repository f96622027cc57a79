"""The identity of a model's weights, so that an artifact can say what it was made from."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def hash_weights(model: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of the state dict, in name order, as hexadecimal text.

    Tensors on the meta device have no bytes and count by name, dtype and shape alone.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        if tensor.device.type != "meta":
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor
            digest.update(data.numpy().data)
    return digest.hexdigest()
