"""Plot of the README: ``python docs/hooks/published_gain.py docs/images/published-gain.png``.

Values: table 1 of Yang et al., CondConv (NeurIPS 2019): ImageNet, 8 experts, trained from scratch.
"""

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

ROWS = {  # MACs in millions and top-1 in percent, static and CondConv
    "MobileNetV1": (567, 71.9, 600, 73.7),
    "MobileNetV2": (301, 71.6, 329, 74.6),
    "MnasNet-A1": (312, 74.9, 325, 76.2),
    "EfficientNet-B0": (391, 77.2, 413, 78.3),
    "ResNet-50": (4093, 77.7, 4213, 78.6),
}


def main(path: Path) -> None:
    """One arrow per network, from static to CondConv."""
    figure, axes = plt.subplots(figsize=(7, 3.4))
    for name, (macs, top1, macs_after, top1_after) in ROWS.items():
        axes.annotate(
            "", (macs_after, top1_after), (macs, top1), arrowprops={"arrowstyle": "->", "color": "C1", "lw": 2}
        )
        axes.plot(macs, top1, "o", color="C0")
        axes.annotate(
            f"{name}  +{top1_after - top1:.1f}", (macs_after, top1_after), (8, -3), textcoords="offset points"
        )
    axes.set(
        xscale="log",
        xlim=(250, 11000),
        ylim=(71, 79.4),
        xlabel="MACs per image (millions)",
        ylabel="ImageNet top-1 (%)",
    )
    axes.set_xticks([300, 600, 1000, 2000, 4000], ["300", "600", "1000", "2000", "4000"])
    axes.set_xticks([], minor=True)
    axes.set_title("Static (dot) to CondConv with 8 experts (arrow), published", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
