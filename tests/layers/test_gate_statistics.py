"""Statistics of gates against values in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from condconv_surgery.layers.gate_statistics import entropy, shares, total_variation


def test_shares_sum_to_one_and_keep_their_dtype() -> None:
    gate = torch.tensor([[1.0, 3.0], [0.0, 0.0], [1e-30, 3e-30]])
    torch.testing.assert_close(shares(gate), torch.tensor([[0.25, 0.75], [0.0, 0.0], [0.25, 0.75]]))
    assert shares(gate.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("share", "nats"),
    [([1.0, 0.0, 0.0], 0.0), ([1 / 3] * 3, math.log(3)), ([0.5, 0.5, 0.0], math.log(2)), ([0.0, 0.0, 0.0], 0.0)],
    ids=["one expert", "all alike", "two of three", "none"],
)
def test_entropy_is_in_nats_with_zero_times_log_zero_equal_to_zero(share: list[float], nats: float) -> None:
    p = torch.tensor([share, share], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(entropy(p), torch.tensor([nats, nats], dtype=torch.float64), rtol=0, atol=1e-15)
    entropy(p).sum().backward()
    assert p.grad is not None
    assert p.grad.isfinite().all()  # a share of exactly 0, as expert dropout makes it


def test_total_variation_is_the_mean_distance_from_the_mean_gates() -> None:
    assert total_variation(torch.rand(1, 3).expand(5, 3)) < 1e-7
    one_hot = torch.eye(4, dtype=torch.float64)
    assert float(total_variation(one_hot)) == pytest.approx(1 - 1 / 4)
    assert float(total_variation(2 * one_hot)) == pytest.approx(2 * (1 - 1 / 4))
