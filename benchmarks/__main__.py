"""``python -m benchmarks layers|implementations|models|experts|memory|convert|overhead``, or ``reproduce README``.

Tables on stdout, progress on stderr.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.conversion_cost import conversion_table, measure_conversion
from benchmarks.geometries.model_geometries import MODELS, QUICK, Site, sites
from benchmarks.geometries.timm_geometries import drawn_sites
from benchmarks.implementations import implementations_line, measure_implementations
from benchmarks.layer_overhead import measure_overhead
from benchmarks.layer_times import VARIANTS, LayerResult, LayerRun, measure_layers
from benchmarks.model_times import measure_model, peak_training_bytes
from benchmarks.presenting import environment, layer_table, model_table, plot_experts, write_json
from benchmarks.protocol import MAX_OTHERS, MIN_REPEATS, Protocol
from benchmarks.reproduce import PAGES, reproduce
from benchmarks.setting import Setting
from benchmarks.timing import use_clock
from condconv_surgery import native
from condconv_surgery.errors import InputError
from condconv_surgery.recipe import CondConv, Variant


def main(arguments: list[str] | None = None) -> None:
    """Parse, measure, print, write."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.clock == "graph" and options.device == "cpu":
        parser.error("--clock graph is for --device cuda: a CPU has no graphs to replay")
    torch.set_num_threads(options.threads)
    use_clock(options.clock)
    if options.native is not None:
        native.enable() if options.native else native.disable()
    options.out.mkdir(parents=True, exist_ok=True)
    commands = {
        "layers": _layers,
        "implementations": _implementations,
        "models": _models,
        "experts": _experts,
        "memory": _memory,
        "convert": _convert,
        "overhead": _overhead,
        "reproduce": _reproduce,
    }
    try:
        commands[options.what](options)
    except InputError as error:
        raise SystemExit(f"Error: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    whats = ["layers", "implementations", "models", "experts", "memory", "convert", "overhead", "reproduce"]
    parser.add_argument("what", choices=whats)
    parser.add_argument("page", nargs="?", default="README", choices=list(PAGES), help="of reproduce: whose figures")
    parser.add_argument("--max-others", type=float, default=MAX_OTHERS, help="cores that other processes may use")
    parser.add_argument(
        "--generated", type=int, metavar="N", help="of layers: N geometries drawn from all families of timm"
    )
    parser.add_argument("--seed", type=int, default=0, help="of --generated")
    parser.add_argument(
        "--resume", action="store_true", help="of layers: keep what the file of a run with the same options holds"
    )
    parser.add_argument("--quick", action="store_true", help="measure few geometries and models (minutes)")
    parser.add_argument(
        "--models", nargs="+", metavar="NAME", help=f"torchvision models to measure: {', '.join(MODELS)}"
    )
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS, "condconv8"], metavar="NAME")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pixels", type=int, default=224, help="side of the input images")
    parser.add_argument("--repeats", type=int, default=None, help=f"timed repeats, by default {MIN_REPEATS}")
    parser.add_argument("--seconds", type=float, default=0.05, help="run a layer for this long in each repeat")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu", "graph"],
        default="wall",
        help="cpu: processor time of one thread, for a busy machine; graph: CUDA graph replays, without Python",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--autocast", choices=["bfloat16", "float16"], help="mixed precision instead of float32")
    parser.add_argument("--channels-last", action="store_true", help="images and static kernels in channels_last")
    parser.add_argument(
        "--native",
        action=argparse.BooleanOptionalAction,
        help="insist on the C++ kernels or do without; default: those of the installation. With them: native-*.json",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="folder for JSON files and the plot"
    )
    return parser


def _layers(options: argparse.Namespace) -> None:
    name = "layers" if options.generated is None else "generated-layers"
    results: list[LayerResult] = []
    for result in measure_layers(_sites(options), _variants(options), _layer_run(options), _earlier(options, name)):
        results.append(result)
        _write(options, name, [r.as_json() for r in results])
    print(layer_table(results))


def _implementations(options: argparse.Namespace) -> None:
    results = measure_implementations(
        _sites(options), _variants(options), options.batch, _repeats(options), options.seconds, _setting(options)
    )
    print("measured / estimated milliseconds per batch; * chosen implementation; its time / the fastest time")
    print(*map(implementations_line, results), sep="\n")
    _write(options, "implementations", [r.as_json() for r in results])


def _models(options: argparse.Namespace) -> None:
    names = options.models or (("mobilenet_v2", "resnet18") if options.quick else MODELS)
    results = []
    for name in names:
        for batch, mode in ((1, "eval"), (options.batch, "eval"), (options.batch, "train")):
            protocol = _protocol(options, 15 if batch == 1 else _repeats(options))
            result = measure_model(
                name, _variants(options), batch, mode, protocol, not options.quick, options.pixels, _setting(options)
            )
            print(model_table([result]), flush=True)
            results.append(result)
    _write(options, "models", [r.as_json() for r in results])


def _experts(options: argparse.Namespace) -> None:
    site = next(s for s in sites(("resnet18",)) if str(s) == "resnet18 3x3 128->128 @28")
    lines: dict[str, dict[int, float]] = {}
    for count in (1, 2, 4, 8, 16, 32):
        variants: dict[str, Variant] = {f"condconv{count}": CondConv(experts=count)}
        for result in measure_layers([site], variants, _layer_run(options)):
            seconds = {who: spread.median for who, spread in result.times.seconds.items()}
            static = seconds.pop("static")
            for who, value in seconds.items():
                lines.setdefault(f"{who} ({result.mode})", {})[count] = value / static
    for name, line in lines.items():
        print(f"{name:16}", "  ".join(f"{n}: {value:.2f}" for n, value in line.items()))
    plot_experts(options.out / f"{_prefix(options)}experts.png", f"{site}, batch {options.batch}", lines)
    _write(options, "experts", lines)


def _memory(options: argparse.Namespace) -> None:
    by_model = {}
    for name in options.models or ("resnet18", "mobilenet_v2"):
        which = ("static", *_variants(options))
        peaks = {variant: peak_training_bytes(name, variant, options.batch, _setting(options)) for variant in which}
        by_model[name] = peaks
        print(f"{name:16}", "  ".join(f"{who} {value / 2**20:.0f} MiB" for who, value in peaks.items()), flush=True)
    _write(options, "memory", by_model)


def _convert(options: argparse.Namespace) -> None:
    costs = []
    for name in options.models or (("resnet18",) if options.quick else ("resnet50", "resnet18", "mobilenet_v2")):
        for experts in (8, 2):
            for prove in (False, True):
                cost = measure_conversion(name, experts, prove, options.threads)
                print(conversion_table([cost]), flush=True)
                costs.append(cost)
    _write(options, "convert", [{**asdict(cost), "peak/both": cost.ratio} for cost in costs])


def _overhead(options: argparse.Namespace) -> None:
    found = measure_overhead(_repeats(options))
    print(*(f"{name:10} {spread}" for name, spread in found.items()), sep="\n")
    _write(options, "overhead", {name: asdict(spread) for name, spread in found.items()})


def _reproduce(options: argparse.Namespace) -> None:
    """Print each figure of a page as it is stated and as it is measured now."""
    found, protocol = [], _protocol(options, _repeats(options))
    for answer in reproduce(PAGES[options.page].read_text(encoding="utf-8"), protocol, options.models):
        print(answer.line(), flush=True)
        found.append(asdict(answer))
    _write(options, f"reproduce-{options.page}", {"protocol": asdict(protocol), "answers": found})


def _sites(options: argparse.Namespace) -> list[Site]:
    if options.generated is not None:
        return drawn_sites(options.generated, options.seed)
    chosen = sites(tuple(options.models or MODELS), options.pixels)
    if options.quick and not options.models:
        chosen = [site for site in chosen if str(site) in QUICK]
    return chosen


def _variants(options: argparse.Namespace) -> dict[str, Variant]:
    known: dict[str, Variant] = {**VARIANTS, "condconv8": CondConv(experts=8)}
    return {name: known[name] for name in options.variants or VARIANTS}


def _setting(options: argparse.Namespace) -> Setting:
    return Setting(options.device, options.autocast, options.channels_last)


def _repeats(options: argparse.Namespace) -> int:
    return options.repeats or MIN_REPEATS


def _protocol(options: argparse.Namespace, repeats: int) -> Protocol:
    return Protocol(repeats, options.threads, options.max_others)


def _layer_run(options: argparse.Namespace) -> LayerRun:
    protocol, generated = _protocol(options, _repeats(options)), options.generated is not None
    return LayerRun(protocol, options.batch, options.seconds, _setting(options), torch_ways=generated)


def _earlier(options: argparse.Namespace, name: str) -> list[LayerResult]:
    """What an earlier run left, where ``--resume`` asks for it. Raises ``InputError`` for one of other conditions."""
    path = _path(options, name)
    if not options.resume or not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    results = content.pop("results")
    now = json.loads(json.dumps(_conditions(options)))
    if content != now:
        differing = sorted(what for what in now if content.get(what) != now[what])
        raise InputError(
            f"{path} was measured under other conditions: {', '.join(differing)}.",
            "Results of one file have the same conditions.",
            "--out with another folder, or without --resume",
        )
    return [LayerResult.from_json(values) for values in results]


def _conditions(options: argparse.Namespace) -> dict[str, object]:
    return {
        "environment": environment(options.threads),
        "clock": options.clock,
        "native": native.is_enabled(),
        "setting": asdict(_setting(options)),
        "batch": options.batch,
    }


def _write(options: argparse.Namespace, name: str, results: object) -> None:
    write_json(_path(options, name), {**_conditions(options), "results": results})


def _path(options: argparse.Namespace, name: str) -> Path:
    folder: Path = options.out
    return folder / f"{_prefix(options)}{name}.json"


def _prefix(options: argparse.Namespace) -> str:
    clock = "graph-" if options.clock == "graph" else ""
    return ("native-" if native.is_enabled() else "") + _setting(options).name + clock


if __name__ == "__main__":
    main()
