"""Costs of the arms of a study: parameters, MACs and latency of their trained networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from condconv_surgery.recipe.study_record import ArmCost, ArmRecord, StudyRecord
from condconv_surgery.reporting.measure.forward_arguments import arguments_for
from condconv_surgery.reporting.measure.latency import measure_latency
from condconv_surgery.reporting.measure.profile import profile

SECONDS = 2.0
"""About how long the latency of an arm is measured."""


def with_costs(record: StudyRecord, trained: Callable[[ArmRecord], nn.Module]) -> StudyRecord:
    """The record with the costs of each arm that has none: of a study that another loop recorded, too.

        record = with_costs(record, lambda arm: {"static": plain, "condconv:4": converted}[arm.name])

    trained: gives the network of an arm, on the device on which its latency is to be measured.
    Latency is that of one image, measured alternately with the same network whose conditional layers are plain ones,
    which is what the baseline computes.
    """
    for arm in record.arms:
        if arm.cost.latency is None:
            record = record.with_arm(replace(arm, cost=_measured(arm.cost, trained(arm))))
    return record


def _measured(cost: ArmCost, model: nn.Module) -> ArmCost:
    totals, latency = profile(model), measure_latency(model, arguments_for(model), 1, seconds=SECONDS)
    converted = totals.converted > 0
    return replace(
        cost,
        parameters=totals.parameters,
        macs=totals.macs.total,
        latency=latency.median,
        latency_ratio=latency.ratio if converted else 1.0,
    )
