"""The HTML page, in a real browser."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from condconv_surgery import report
from condconv_surgery.errors import InputError
from condconv_surgery.reporting import Comparison, Report, write_page
from condconv_surgery.reporting.images.routing_statistics import layer_routing
from condconv_surgery.reporting.render.matplotlib_figures import HEAT, STRONGEST, heat_map, to_svg
from condconv_surgery.reporting.render.plots import gates_by_class
from tests.browser import CHROMIUM, act, press
from tests.measured_report import SPEC

browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")


def test_the_page_is_self_contained(measured: Report, tmp_path: Path) -> None:
    page = measured.to_html()
    assert len(page.encode()) < 5_000_000
    loaded = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(["']?([^"')]*)|@import""", page)
    assert all((a or b).startswith(("data:", "#")) for a, b in loaded), "data, or a part of the page itself"
    write_page(measured, tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == page
    with pytest.raises(InputError, match="could not be written"):
        write_page(measured, tmp_path / "missing" / "r.html")


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
def test_sorts_and_filters_by_the_keyboard_alone(measured: Report, tmp_path: Path) -> None:
    """Tab to the heading of MACs, then real keys; Tab on to the filter and type."""
    page = measured.to_html()
    focus = "document.querySelectorAll('#layers thead button')[4].focus()"
    page = page.replace("</body>", f"<script>{focus}</script></body>")
    state = """({
      macs: [...document.querySelectorAll('#layers tbody tr')].map(row => Number(row.cells[5].dataset.value)),
      sorted: document.querySelectorAll('#layers th')[5].getAttribute('aria-sort'),
      focus: document.activeElement.textContent })"""
    once, twice = (press(page, ["Tab", *keys], state, tmp_path) for keys in (["Enter"], ["Enter", "Space"]))
    assert once["focus"] == twice["focus"] == "MACs"
    assert (once["sorted"], twice["sorted"]) == ("descending", "ascending")
    assert once["macs"] == sorted(once["macs"], reverse=True)
    assert twice["macs"] == sorted(once["macs"]) != once["macs"]
    page = page.replace(focus, "document.getElementById('filter').focus()")
    assert press(page, ["odconv"], "document.getElementById('count').textContent", tmp_path) == "2 of 4 layers"


@browser
def test_images_and_heat_maps_are_visible(measured: Report, tmp_path: Path) -> None:
    script = """
      const look = (s, p) => [...document.querySelectorAll(s)].map(e => getComputedStyle(e)[p]);
      return { images: look('.pic', 'backgroundImage'), heat: look('.heat td', 'backgroundColor') };"""
    found, _ = act(measured.to_html(), script, tmp_path)
    assert found["images"]
    assert all(image.startswith('url("data:image/jpeg;base64,') for image in found["images"])
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


def test_values_in_a_heat_map_keep_their_colour_on_a_dark_page() -> None:
    svg = to_svg(heat_map([[0.1, 0.9]], ["layer"], "gates"))
    for text in ("0.10", "0.90", "layer"):
        assert re.search(rf"<text(?![^>]*fill: #)[^>]*>{text}</text>", svg), "the colour of the page's text"


def test_a_heat_map_covers_at_most_so_much_that_text_is_readable_in_light_and_dark() -> None:
    """WCAG AA on the darkest cell, for the ink and the paper of both schemes."""
    colour = [int(HEAT[i : i + 2], 16) for i in (1, 3, 5)]
    for ink, paper in (("#1b1f24", "#ffffff"), ("#e6e9ed", "#14181d")):
        below = [int(paper[i : i + 2], 16) for i in (1, 3, 5)]
        mixed = [round(STRONGEST * c + (1 - STRONGEST) * b) for c, b in zip(colour, below, strict=True)]
        assert contrast(luminance(ink), luminance("#{:02x}{:02x}{:02x}".format(*mixed))) >= 4.5


def test_a_thousand_classes_fit_on_a_page_and_in_a_plot(measured: Report) -> None:
    gates = torch.rand(1000, 8, generator=torch.Generator().manual_seed(0))
    gates[700] = torch.tensor([9.0, 0, 0, 0, 0, 0, 0, 0])
    layer = layer_routing("layer", gates, torch.arange(1000), 1000)
    assert measured.routing is not None
    names = tuple(f"class{i:04d}" for i in range(1000))
    layers = tuple(replace(layer, name=f"layer{i}", top=((0, 1, 2, 3),) * 8) for i in range(52))
    routing = replace(measured.routing, layers=layers, classes=names)
    page = replace(measured, routing=routing).to_html()
    assert len(page.encode()) < 5_000_000
    assert "the 48 of 1000 classes that differ most" in page
    assert page.count("class0700") == 52
    figure = gates_by_class(layer, names)
    assert len(figure.axes[0].get_yticklabels()) == 100
    assert "100 of 1000 classes that differ most" in figure.axes[0].get_title()


def test_a_model_that_multiplies_nothing_has_a_page_without_plots(tmp_path: Path) -> None:
    found = report(nn.Sequential(nn.ReLU()), inputs=SPEC)
    assert "<svg" not in found.to_html()
    assert found.write_plots(tmp_path) == []


def test_plots(measured: Report, tmp_path: Path) -> None:
    files = measured.write_plots(tmp_path / "plots")
    assert sorted(f.name for f in files) == sorted(
        f"{name}.{kind}" for name in ("layers", "experts", "gates_by_class", "confusion") for kind in ("png", "svg")
    )
    for file in files:
        if file.suffix == ".png":
            with Image.open(file) as image:
                assert len(image.convert("L").getcolors(65536) or []) > 8, "something is drawn"
        else:
            assert "<svg" in file.read_text()


@browser
def test_no_table_is_cut_at_the_width_of_a_laptop(measured: Report, tmp_path: Path) -> None:
    script = """
      for (const closed of document.querySelectorAll('details')) closed.open = true;
      return [...document.querySelectorAll('.scroll')].filter(e => e.querySelector('table'))
        .map(e => e.scrollWidth - e.clientWidth);"""
    found, _ = act(measured.to_html(), script, tmp_path, 1280)
    assert len(found) > 4
    assert set(found) == {0}


@browser
def test_on_paper_all_is_open_but_layers_that_hardly_vary(measured: Report, tmp_path: Path) -> None:
    assert measured.routing is not None
    first, *others = measured.routing.layers
    still = replace(first, name="still", variation=0.0)
    page = replace(measured, routing=replace(measured.routing, layers=(first, *others, still))).to_html()
    script = """
      dispatchEvent(new Event('beforeprint'));
      return [...document.querySelectorAll('details:not([open]) summary')].map(e => e.textContent);"""
    found, _ = act(page, script, tmp_path)
    closed = {f"{layer.name}: {layer.verdict}" for layer in (first, *others, still) if layer.static}
    assert "still: hardly varies: static layer suffices" in closed
    assert len(closed) < len(others) + 2, "some are open"
    plural = "s" if len(closed) > 1 else ""
    assert {text for text in found if text in closed} == closed
    group = [text for text in found if text not in closed]
    assert [text.split(":")[0] for text in group] == [
        f"Static layer suffices in {len(closed)} layer{plural}",
        f"{len(closed)} layer{plural} for which a static layer suffices",
    ]
