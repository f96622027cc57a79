"""The page in a real browser, the texts at a fixed width, the JSON by its keys."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from condconv_surgery import CondConv, ODConv, convert, report
from condconv_surgery.errors import InputError
from condconv_surgery.recipe import InputSpec, Recipe, attach_recipe
from condconv_surgery.reporting import Comparison, Report, recorded_accuracy, write_page
from condconv_surgery.reporting.comparison import HEADERS
from condconv_surgery.reporting.terminal import render_comparison, render_experts, render_profile, render_routing
from tests.browser import CHROMIUM, act
from tests.pictures import write_pictures
from tests.small_networks import small_net
from tests.variants import scramble

GOLDEN = Path(__file__).parent / "golden"
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
SPEC = InputSpec(3, 32, 32, (0.5,) * 3, (0.25,) * 3)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    body = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16)]
    body += [nn.ReLU(), nn.Conv2d(16, 32, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3)]
    model = nn.Sequential(*body).eval()
    attach_recipe(model, Recipe(input=SPEC, classes=("class0", "class1", "class2")))
    return model


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = write_pictures(tmp_path_factory.mktemp("pictures"), classes=3, each=6)
    model = convert(network(), ODConv(4), prove=False).model
    scramble(model)
    return report(model, data=folder)


def shown(renderable: object, width: int = 80) -> str:
    console = Console(width=width, highlight=False, file=io.StringIO(), color_system=None)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def same_as_golden(name: str, text: str) -> None:
    """Set UPDATE_GOLDEN=1 to write the files anew; then read them."""
    file = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("variant", [CondConv(4), ODConv(2)], ids=["condconv", "odconv"])
def test_golden_texts(variant: CondConv | ODConv) -> None:
    found = report(convert(network(), variant, prove=False).model)
    table = shown(render_profile(found.profile, found.title))
    assert max(len(line) for line in table.splitlines()) <= 80
    same_as_golden(f"{variant.kind}.txt", table)
    same_as_golden(f"{variant.kind}.md", replace(found, cost=None).to_markdown())
    same_as_golden(f"{variant.kind}.csv", found.to_csv())


def keys(value: object) -> object:
    """The shape of a JSON value: keys and types, the first element for a list."""
    if isinstance(value, dict):
        return {name: keys(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [keys(value[0])] if value else []
    return type(value).__name__


def test_golden_json_schema(measured: Report) -> None:
    data = json.loads(json.dumps(measured.to_dict(), allow_nan=False))
    data["routing"]["attention_spread"] = {"NAME": 0.0}
    same_as_golden("schema.json", json.dumps(keys(data), indent=1) + "\n")


def test_long_names_and_many_experts_fit_80_columns() -> None:
    inner = nn.ModuleDict({"a_very_long_name_of_a_block_that_somebody_chose": network()})
    model = nn.Sequential(inner["a_very_long_name_of_a_block_that_somebody_chose"])
    wrapped = nn.Sequential()
    wrapped.add_module("a_very_long_name_of_a_block_that_somebody_chose", model)
    found = report(convert(wrapped, ODConv(32), example=torch.randn(1, 3, 32, 32), prove=False).model, inputs=SPEC)
    lines = shown(render_profile(found.profile, found.title)).splitlines()
    assert max(len(line) for line in lines) <= 80
    assert not any("E+" in line for line in lines)
    assert any(line.startswith("…") and ".5 " in line for line in lines), "the end of a name is what tells layers apart"


def test_everything_on_a_terminal_fits_80_columns(measured: Report) -> None:
    assert measured.cost is not None
    assert measured.routing is not None
    parts = [
        render_profile(measured.profile, measured.title, cost=measured.cost),
        render_experts(measured.experts),
        render_routing(measured.routing, measured.experts),
    ]
    for part in parts:
        assert max(len(line) for line in shown(part).splitlines()) <= 80
    assert "would do as plain convolutions" in shown(render_routing(measured.routing)).replace("\n", " ")


def test_csv_sums_to_its_last_line(measured: Report) -> None:
    header, *rows, total = csv.reader(io.StringIO(measured.to_csv()))
    for column in range(header.index("parameters_before"), len(header)):
        assert sum(int(row[column]) for row in rows) == int(total[column]), header[column]


def test_the_page_needs_nothing_beside_it(measured: Report, tmp_path: Path) -> None:
    page = measured.to_html()
    assert len(page.encode()) < 5_000_000
    loaded = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(["']?([^"')]*)|@import""", page)
    assert all((a or b).startswith(("data:", "#")) for a, b in loaded), "data, or a part of the page itself"
    write_page(page, tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == page
    with pytest.raises(InputError, match="could not be written"):
        write_page(page, tmp_path / "missing" / "r.html")


def test_names_are_escaped() -> None:
    model = nn.Sequential()
    model.add_module("<script>alert(1)</script>", nn.Conv2d(3, 3, 1))
    found = replace(report(model, inputs=SPEC), title="<img src=x>")
    for page in (found.to_html(), found._repr_html_(), Comparison((found,)).to_html()):
        assert "<script>alert" not in page
        assert "<img" not in page


@browser
def test_sorts_and_filters_in_a_browser(measured: Report, tmp_path: Path) -> None:
    script = """
      const column = n => [...document.querySelectorAll('#layers tbody tr')].filter(r => !r.hidden)
        .map(r => r.cells[n].dataset.value ? Number(r.cells[n].dataset.value) : r.cells[n].textContent.trim());
      const buttons = document.querySelectorAll('#layers thead button');
      const out = { before: column(5) };
      buttons[5].click(); out.down = column(5); out.state = buttons[5].parentElement.getAttribute('aria-sort');
      buttons[5].click(); out.up = column(5);
      buttons[0].click(); out.names = column(0); out.left = buttons[5].parentElement.getAttribute('aria-sort');
      const filter = document.getElementById('filter');
      filter.value = 'ODCONV'; filter.dispatchEvent(new Event('input')); out.filtered = column(1);
      out.count = document.getElementById('count').textContent;
      filter.value = ''; filter.dispatchEvent(new Event('input'));
      document.getElementById('only').click(); out.only = column(1);
      return out;"""
    found, console = act(measured.to_html(), script, tmp_path)
    assert console == []
    assert found["down"] == sorted(found["before"], reverse=True) != found["before"]
    assert found["up"] == sorted(found["before"])
    assert (found["state"], found["left"]) == ("descending", None)
    assert found["names"] == sorted(found["names"])
    assert found["filtered"] == found["only"] == ["odconv", "odconv"]
    assert found["count"] == "2 of 4 layers"


@browser
def test_pictures_and_heat_are_seen(measured: Report, tmp_path: Path) -> None:
    script = """
      const look = (s, p) => [...document.querySelectorAll(s)].map(e => getComputedStyle(e)[p]);
      return { pictures: look('.pic', 'backgroundImage'), heat: look('.heat td', 'backgroundColor') };"""
    found, _ = act(measured.to_html(), script, tmp_path)
    assert found["pictures"]
    assert all(picture.startswith('url("data:image/jpeg;base64,') for picture in found["pictures"])
    assert len(set(found["heat"])) > 3, "gates that differ have colours that differ"


ACCESSIBLE = """
  const named = e => (e.labels && e.labels.length) || e.textContent.trim() || e.getAttribute('aria-label');
  const all = s => [...document.querySelectorAll(s)];
  for (const closed of all('details')) closed.open = true;
  const scale = e => e.getScreenCTM ? Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b) : 1;  // of a plot's text
  const size = e => parseFloat(getComputedStyle(e).fontSize) * scale(e);
  return {
    language: document.documentElement.lang, title: document.title, headings: all('h1').length,
    nameless: all('button, input, [role=img], [role=region]').filter(e => !named(e)).length,
    scopeless: all('th').filter(e => !e.scope).length,
    small: all('main *').filter(e => e.textContent.trim() && size(e) < 11 && !e.querySelector('*')).length,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    width: document.documentElement.clientWidth };"""


@browser
@pytest.mark.parametrize("width", [1200, 500])
def test_readable_on_a_phone_and_by_a_screen_reader(measured: Report, tmp_path: Path, width: int) -> None:
    for page in (measured.to_html(), Comparison((measured, measured)).to_html()):
        found, console = act(page, ACCESSIBLE, tmp_path, width)
        assert console == []
        assert found["language"] == "en"
        assert found["title"].endswith("condconv report")
        assert found["headings"] == 1
        assert (found["nameless"], found["scopeless"], found["small"]) == (0, 0, 0)
        assert found["overflow"] == 0, "only tables scroll sideways, not the page"
        assert found["width"] <= width


@browser
def test_light_and_dark_have_contrast(measured: Report, tmp_path: Path) -> None:
    """WCAG AA: 4.5 to 1 for text, in both schemes, by their own variables."""
    style = measured.to_html()
    for block in re.findall(r"--ink: (#\w+); --soft: (#\w+); --line: #\w+; --paper: (#\w+); --panel: (#\w+)", style):
        ink, soft, paper, panel = (luminance(colour) for colour in block)
        assert min(contrast(a, b) for a in (ink, soft) for b in (paper, panel)) >= 4.5
    assert style.count("--ink: #") == 2


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: float, b: float) -> float:
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)


def test_plots(measured: Report, tmp_path: Path) -> None:
    files = measured.write_plots(tmp_path / "plots")
    assert sorted(f.name for f in files) == sorted(
        f"{name}.{kind}" for name in ("layers", "experts", "gates_by_class") for kind in ("png", "svg")
    )
    for file in files:
        if file.suffix == ".png":
            with Image.open(file) as picture:
                assert len(picture.convert("L").getcolors(65536) or []) > 8, "something is drawn"
        else:
            assert "<svg" in file.read_text()


def test_comparison(measured: Report, tmp_path: Path) -> None:
    plain = replace(report(small_net(), inputs=SPEC), title="plain", recorded=0.5)
    both = Comparison((plain, measured))
    assert both.to_dict()["models"][0]["accuracy"] == 0.5
    text = shown(render_comparison(HEADERS, both.rows()))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "50.0%" in text
    assert "latency" not in text, "a column in which nothing was measured"
    assert both.to_markdown().count("\n") == 4
    assert len(both.to_csv().splitlines()) == 3
    assert "<svg" in both.to_html()
    assert [f.name for f in both.write_plots(tmp_path)] == ["comparison.png", "comparison.svg"]
    unknown = Comparison((replace(plain, recorded=None),))
    assert "<svg" not in unknown.to_html()
    with pytest.raises(InputError, match="No accuracy is known"):
        unknown.write_plots(tmp_path)


def test_accuracy_that_a_run_recorded(tmp_path: Path) -> None:
    rows = [{"val_top1": 0.3, "best": True}, {"val_top1": 0.5, "best": True}, {"val_top1": 0.4, "best": False}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"val_t')
    for name in ("best", "last", "other"):
        (tmp_path / f"{name}.safetensors").touch()
    found = [recorded_accuracy(tmp_path / f"{name}.safetensors") for name in ("best", "last", "other", "missing")]
    assert found == [0.5, 0.4, None, None]
    assert recorded_accuracy("torchvision:resnet18") is None
