"""Ultralytics' YOLO with conditional layers, which its training, validation, fusing and export keep.

    yolo = convert_yolo(YOLO("yolo11n.pt"), cs.CondConv(experts=4))
    yolo.train(data="coco8.yaml", epochs=3)

Ultralytics builds a network anew from its description when it trains, copies the tensors whose names and shapes fit,
and leaves the others random; and it folds batch norms into ``nn.Conv2d`` wherever it runs a network. So the trainers
here put the conditional layers into what is built, and the network's class folds batch norms into experts.

Only training needs ``ConditionalYOLO("best.pt")``, or one of the trainers; any other trainer stops with an error.
"""

from condconv_surgery.integrations.ultralytics.conditional_yolo import ConditionalYOLO, convert_yolo, with_network
from condconv_surgery.integrations.ultralytics.yolo_networks import MERGED, NETWORKS, conditional_network
from condconv_surgery.integrations.ultralytics.yolo_trainers import (
    TRAINERS,
    ConditionalClassificationTrainer,
    ConditionalDetectionTrainer,
    ConditionalOBBTrainer,
    ConditionalPoseTrainer,
    ConditionalSegmentationTrainer,
)

__all__ = [
    "MERGED",
    "NETWORKS",
    "TRAINERS",
    "ConditionalClassificationTrainer",
    "ConditionalDetectionTrainer",
    "ConditionalOBBTrainer",
    "ConditionalPoseTrainer",
    "ConditionalSegmentationTrainer",
    "ConditionalYOLO",
    "conditional_network",
    "convert_yolo",
    "with_network",
]
