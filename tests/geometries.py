"""The table of geometries over which the ways to convolve are compared, as arguments of nn.Conv2d."""

from __future__ import annotations

GEOMETRIES: dict[str, dict] = {
    "3x3": dict(in_channels=8, out_channels=12, kernel_size=3, padding=1),
    "1x1": dict(in_channels=8, out_channels=12, kernel_size=1),
    "1x1 strided": dict(in_channels=8, out_channels=12, kernel_size=1, stride=2),
    "1x1 padded": dict(in_channels=8, out_channels=4, kernel_size=1, padding=1),
    "1x1 groups": dict(in_channels=8, out_channels=12, kernel_size=1, groups=4),
    "1x1 depthwise": dict(in_channels=8, out_channels=8, kernel_size=1, groups=8),
    "depthwise": dict(in_channels=8, out_channels=8, kernel_size=3, padding=1, groups=8),
    "depthwise strided": dict(in_channels=8, out_channels=8, kernel_size=5, stride=2, padding=2, groups=8),
    "depthwise multiplier": dict(in_channels=4, out_channels=8, kernel_size=3, padding=1, groups=4),
    "groups": dict(in_channels=8, out_channels=12, kernel_size=3, groups=2),
    "stride": dict(in_channels=8, out_channels=12, kernel_size=3, stride=(2, 1), padding=1),
    "dilation": dict(in_channels=8, out_channels=12, kernel_size=3, dilation=2, padding=2),
    "non-square": dict(in_channels=8, out_channels=12, kernel_size=(1, 5), padding=(0, 2)),
    "non-square all": dict(
        in_channels=4, out_channels=6, kernel_size=(5, 2), stride=(1, 2), padding=(3, 1), dilation=(1, 2)
    ),
    "same": dict(in_channels=8, out_channels=12, kernel_size=3, padding="same"),
    "same even": dict(in_channels=8, out_channels=12, kernel_size=(4, 2), padding="same", dilation=(1, 3)),
    "valid": dict(in_channels=8, out_channels=12, kernel_size=3, padding="valid"),
    "reflect": dict(in_channels=8, out_channels=12, kernel_size=3, padding=2, padding_mode="reflect"),
    "replicate": dict(in_channels=8, out_channels=12, kernel_size=3, padding=(1, 2), padding_mode="replicate"),
    "circular": dict(in_channels=8, out_channels=12, kernel_size=3, padding=1, padding_mode="circular", groups=2),
    "reflect same": dict(in_channels=8, out_channels=12, kernel_size=4, padding="same", padding_mode="reflect"),
    "no bias": dict(in_channels=8, out_channels=12, kernel_size=3, padding=1, bias=False),
    "large kernel": dict(in_channels=8, out_channels=8, kernel_size=7, padding=3, groups=8),
}


def without_bias(arguments: dict) -> dict:
    return {name: value for name, value in arguments.items() if name != "bias"}
