"""Results as tables, JSON and a plot."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision

from benchmarks.layer_times import LayerResult
from benchmarks.model_times import ModelResult


def environment(threads: int) -> dict[str, object]:
    """Hardware and versions of a measurement."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        **_graphics(),
    }


def layer_table(results: Sequence[LayerResult]) -> str:
    """One line per geometry, the geometric means, and the lines of layers at which another contender is faster."""
    lines = [f"{'layer':36} {'variant':10} {'mode':5} {'static ms':>9}  {'ours/static':16}  {'speed-up':16}  over"]
    lines += [_layer_line(r) for r in results]
    for variant, mode in dict.fromkeys((r.variant, r.mode) for r in results):
        chosen = [r for r in results if (r.variant, r.mode) == (variant, mode)]
        speedups = [r.speedup.median for r in chosen]
        rival = "authors" if "authors" in chosen[0].times.ratios else "timm"
        of_rival = geometric_mean([r.times.ratios[rival].median for r in chosen])
        lines.append(
            f"{'geometric mean of ' + str(len(chosen)):36} {variant:10} {mode:5} over {rival} {of_rival:.2f},"
            f" over the best other {geometric_mean(speedups):.2f} worst {min(speedups):.2f}"
        )
    below = [r for r in results if r.speedup.median < 1.0]
    sure = sum(r.speedup.upper < 1.0 for r in below)
    lines += [f"below 1.0: {len(below)} of {len(results)}, by more than the spread: {sure}", *map(_layer_line, below)]
    return "\n".join(lines)


def _layer_line(r: LayerResult) -> str:
    return (
        f"{r.site:36} {r.variant:10} {r.mode:5} {1e3 * r.times.seconds['static'].median:9.2f}"
        f"  {r.against_static!s:16}  {r.speedup!s:16}  {r.best_other}"
    )


def model_table(results: Sequence[ModelResult]) -> str:
    """One line per model, batch and mode; one column per contender, the lower bound in brackets."""
    lines = []
    for r in results:
        floors = {who: f" [{value:.2f}]" for who, value in r.floor.items()}
        cells = [f"{who} {value}{floors.get(who, '')}" for who, value in r.times.ratios.items() if who != "static"]
        milliseconds = 1e3 * r.times.seconds["static"].median
        lines.append(f"{r.model:16} batch {r.batch:3} {r.mode:5} {milliseconds:9.1f} ms   " + "  ".join(cells))
    return "\n".join(lines)


def geometric_mean(values: Sequence[float]) -> float:
    """``exp(mean(log v))``."""
    return math.exp(sum(map(math.log, values)) / len(values))


def write_json(path: Path, content: object) -> None:
    """Write atomically: a temporary file in the same folder, then a rename."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as stream:
        json.dump(content, stream, indent=1)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def plot_experts(path: Path, title: str, times: dict[str, dict[int, float]]) -> None:
    """Plot time / static over the number of experts.

    times: by contender and mode, such as ``"ours (eval)"``; one colour per contender, dashed for eval.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4))
    colours = {who: f"C{i}" for i, who in enumerate(dict.fromkeys(name.split()[0] for name in times))}
    for name, by_experts in times.items():
        style = "--" if name.endswith("(eval)") else "-"
        axes.plot(*zip(*by_experts.items(), strict=True), style, marker="o", color=colours[name.split()[0]], label=name)
    axes.set(xscale="log", yscale="log", xlabel="experts", ylabel="time / static", title=title)
    counts = sorted({n for line in times.values() for n in line})
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.set_xticks([], minor=True)
    highest = max(value for line in times.values() for value in line.values())
    shown = [tick for tick in (0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16) if tick < 1.2 * highest]
    axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
    axes.set_yticks([], minor=True)
    axes.set_ylim(bottom=0.9 * min(1.0, *(value for line in times.values() for value in line.values())))
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _graphics() -> dict[str, object]:
    if not torch.cuda.is_initialized():
        return {}
    return {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "float32 in convolutions": torch.backends.cudnn.conv.fp32_precision,
        "float32 in matrix products": torch.backends.cuda.matmul.fp32_precision,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
