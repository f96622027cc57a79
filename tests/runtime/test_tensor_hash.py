"""One hash of tensors: what artifacts store stays valid."""

from __future__ import annotations

import torch
from torch import nn

from condconv_surgery.runtime.tensor_hash import hash_tensors, hash_weights


def model() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Linear(3, 2).to(torch.bfloat16))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter))
    return net


def test_hashes_that_artifacts_already_store_do_not_change() -> None:
    assert hash_weights(model()) == "1516e93071320b78649c7898095f8148d7b35b98e64e1b16f409d2cf5c50111c"
    assert (
        hash_tensors(model().state_dict(), headers=False)
        == "c11dfdc7c41ddb6a49bd7baa2053d428b4aab63a430b5473c259ee4db2a65cfe"
    )


def test_meta_tensors_count_by_header_and_strides_do_not_count() -> None:
    assert hash_weights(model().to("meta")) != hash_weights(nn.Sequential(nn.Conv2d(2, 3, 1)).to("meta"))
    image = torch.randn(1, 3, 4, 4)
    assert hash_tensors({"a": image}) == hash_tensors({"a": image.to(memory_format=torch.channels_last)})
    assert hash_tensors({"a": image}, prefix="x") != hash_tensors({"a": image})


def test_states_that_are_no_dense_tensors_do_not_count() -> None:
    class Counting(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 3}

    torch.manual_seed(0)
    plain = nn.Linear(2, 2)
    counting = Counting(2, 2)
    counting.register_buffer("graph", torch.eye(3).to_sparse())
    counting.load_state_dict(plain.state_dict(), strict=False)
    assert hash_weights(counting) == hash_weights(plain)
