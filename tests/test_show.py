"""Rendering: what notebooks, terminals and pages are given to draw."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest
import torch

from saehooks.errors import ConfigError
from saehooks.show import charts, figures, html, terminal
from saehooks.show.values import Shades, number

TOKENS = ["The", " <b>", "\n", ' "q"']
NAN = float("nan")


class Checker(HTMLParser):
    """Collects text and tags, and whether every tag that opens also closes."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(document)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def spans(document: str) -> list[dict]:
    return [attrs for tag, attrs in Checker(document).tags if tag == "span" and "sh-token" in attrs.get("class", "")]


def test_tokens_html_keeps_every_token_as_text_and_never_as_markup():
    """A token that looks like a tag is shown, not interpreted."""
    document = html.tokens_html(TOKENS, [1, 2, 3, 4])
    checked = Checker(document)
    assert not checked.open
    assert 'The <b>↵\n "q"' in checked.text
    assert "<b>" not in document


def test_tokens_html_shades_between_the_extremes():
    """The smallest value is unshaded, the largest has the strongest shade, and half-way lies half-way."""
    alphas = [
        re.search(r",([\d.]+)\)$", span.get("style", ",0)")).group(1)
        for span in spans(html.tokens_html("abc", [0, 5, 10]))
    ]
    assert [float(alpha) for alpha in alphas] == [0, 0.36, 0.72]


def test_tokens_html_signs_are_two_hues_of_equal_strength():
    """Signed values are symmetric about zero: -2 is as strong as 2, in the other hue."""
    minus, zero, plus = spans(html.tokens_html("abc", [-2, 0, 2], signed=True))
    assert "style" not in zero
    assert minus["style"] != plus["style"]
    assert minus["style"][-7:] == plus["style"][-7:]


def test_tokens_html_says_value_and_top_latents_where_the_reader_points():
    """The tooltip holds position, visible token, value and latents; a left-out position says so."""
    first, second = spans(html.tokens_html(["a", " b"], [NAN, 12], top=[[], [(901, 8.0), (7, 0.25)]]))
    assert first["data-tip"] == "0: a   left out"
    assert second["data-tip"] == "1: ·b   12 latents   top: 901 (8), 7 (0.25)"


@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0, 3.0]])
def test_tokens_need_one_value_each(values):
    """Tokens and values of different length are refused, naming both lengths."""
    with pytest.raises(ConfigError, match=f"2 tokens.*{len(values)} values"):
        html.tokens_html(["a", "b"], values)
    with pytest.raises(ConfigError, match=f"2 tokens.*{len(values)} values"):
        terminal.tokens_text(["a", "b"], values)


def test_values_may_be_tensors_with_gradients():
    """A tensor straight out of a trace can be drawn."""
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    assert len(spans(html.tokens_html(["a", "b"], values))) == 2


def test_table_html_fills_missing_cells_and_escapes():
    """Rows may lack a key, and a heading or a cell is text."""
    document = html.table_html([{"a<": 1}, {"a<": 2, "b": "<i>"}])
    assert Checker(document).text == "a<b1–2<i>"


def test_page_is_self_contained_and_well_formed():
    """No script, no link to elsewhere, one style of tokens however many sections use it."""
    picture = figures.png(figures.ranking_bars(["a", "b"], [1.0, -2.0]))
    section = html.Section("One & two").add(html.tokens_html(TOKENS, [1, 2, 3, 4]), html.table_html([{"x": 1}]))
    document = html.page("Title", [section, html.Section("Three", [html.image(picture, "bars")])], lead="A `b`.")
    checked = Checker(document)
    assert not checked.open
    assert "One & two" in checked.text
    sources = [attrs.get(key, "") for _, attrs in checked.tags for key in ("src", "href")]
    assert all(source.startswith(("", "data:", "#")) and "http" not in source for source in sources)
    assert "<script" not in document
    assert document.count(".sh-token{") == 1


def test_terminal_tokens_are_readable_on_their_shade():
    """Weak shades carry dark letters, strong shades light ones, and no shade leaves the terminal's own colours."""
    assert terminal.shade_style(0.05).color.name == "#000000"
    assert terminal.shade_style(1.0).color.name == "#ffffff"
    assert terminal.shade_style(-1.0).color.name == "#ffffff"
    assert terminal.shade_style(0.0).color is None
    assert terminal.shade_style(None).dim


def test_render_is_plain_where_nobody_asked_for_colour():
    """A repr that goes into a log file holds no escape codes; with colour it does."""
    text = terminal.tokens_text(["a", " b"], [1, 2])
    assert terminal.render(text, color=False) == "a b"
    assert "\x1b[" in terminal.render(text, color=True, width=40)


def test_terminal_table_aligns_numbers_right():
    """A column of numbers ends at the same place in each row."""
    lines = terminal.render(terminal.table([{"n": 1}, {"n": 1000}]), color=False).splitlines()
    assert lines[1].endswith("1")
    assert len(lines[1]) == len(lines[2]) == 5


def test_shades_of_equal_values_are_all_zero():
    """Nothing stands out when every value is the same, and nothing is divided by zero."""
    assert [Shades.over([3.0, 3.0])(value) for value in (3.0, 3.0)] == [0.0, 0.0]
    assert Shades.over([0.0], signed=True)(0.0) == 0.0
    assert Shades.over([NAN])(NAN) is None


def test_numbers_of_tensors_are_written_like_numbers():
    """A one-element tensor in a table is written as its number."""
    assert number(torch.tensor(0.5)) == "0.5"
    assert number(float("inf")) == "inf"


@pytest.mark.parametrize(
    "figure",
    [
        lambda: figures.support_size_histogram(torch.tensor([[3, 4], [4, 90]])),
        lambda: figures.training_curves(
            [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "nmse": 0.5}], log=["loss"]
        ),
        lambda: figures.ranking_bars(["a"], [-1.0]),
        lambda: figures.paired_bars([" the", " a"], {"clean": [0.5, 0.2], "ablated": [0.1, 0.3]}),
        lambda: figures.effect_curves({"a": ([0, 1], [2, 3]), "b": ([0], [1])}, xlabel="x", ylabel="y"),
        lambda: figures.concept_overlay(torch.zeros(2, 4, 4, 3).numpy(), torch.rand(2, 2, 2), titles=["a", "b"]),
    ],
)
def test_every_figure_becomes_a_png_without_touching_pyplot(figure):
    """Figures are made outside pyplot, so none stays open, and a notebook can show them."""
    made = figure()
    assert made._repr_png_().startswith(b"\x89PNG")
    from matplotlib import pyplot

    assert pyplot.get_fignums() == []


@pytest.mark.parametrize(
    ("figure", "message"),
    [
        (lambda: figures.support_size_histogram([]), "no rows"),
        (lambda: figures.training_curves([]), "train at least one step"),
        (lambda: figures.ranking_bars(["a"], []), "1 labels and 0 values"),
        (lambda: figures.concept_overlay([1, 2], torch.zeros(1, 2, 2)), "2 images"),
    ],
)
def test_figures_say_what_is_missing(figure, message):
    """Nothing to draw is a clear error, not an empty picture."""
    with pytest.raises(ConfigError, match=message):
        figure()


def test_figures_read_on_light_and_on_dark_pages():
    """Paper is transparent, and text and lines stand out from white and from near black alike."""
    import io

    import numpy as np
    from PIL import Image

    def luminance(colour):
        rgb = np.array(colour, dtype=float) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    figure = figures.effect_curves({"a": ([0, 1], [1, 2]), "b": ([0, 1], [2, 1])}, xlabel="x", ylabel="y", title="t")
    pixels = np.asarray(Image.open(io.BytesIO(figures.png(figure))).convert("RGBA"))
    assert (pixels[..., 3] == 0).mean() > 0.5
    solid = pixels[pixels[..., 3] == 255][:, :3]
    assert len(solid) > 100
    for paper in ((255, 255, 255), (21, 23, 28)):
        shades = np.unique(solid, axis=0)
        light, dark = luminance(paper), np.array([luminance(shade) for shade in shades])
        contrast = (np.maximum(light, dark) + 0.05) / (np.minimum(light, dark) + 0.05)
        assert contrast.min() > 2.5


def test_one_series_stands_out():
    """With a highlight the named series is blue and the others are greys; without it each has its own colour."""
    series = {"sparsemax": [1, 2], "topk": [2, 1], "relu": [3, 1]}
    lines = {name: ([0, 1], values) for name, values in series.items()}
    bars = figures.paired_bars(["a", "b"], series, highlight="sparsemax")
    curves = figures.effect_curves(lines, xlabel="x", ylabel="y", highlight="sparsemax")
    assert curves.axes[0].lines[0].get_color() == figures.BLUE
    assert all(line.get_color() in figures.GREYS for line in curves.axes[0].lines[1:])
    legend = [handle.get_facecolor() for handle in bars.axes[0].get_legend().legend_handles]
    assert len(set(legend)) == 3
    plain = figures.effect_curves(lines, xlabel="x", ylabel="y")
    assert len({line.get_color() for line in plain.axes[0].lines} & set(figures.COLOURS)) == 3


def test_bars_share_one_scale_through_zero():
    """Each bar begins at 0 and is as long as its number; the names that matter are marked; names are escaped."""
    document = charts.bars_html(
        {"cost": {"<top>": -4.0, "random": 1.0}, "": {"missing": math.nan}}, highlight=["<top>"], caption="nats"
    )
    Checker(document)
    bars = re.findall(r'class="(sh-bar[^"]*)"><span>([^<]*)</span>.*?left:([\d.]+)%;width:([\d.]+)%', document)
    assert bars == [
        ("sh-bar sh-mine", "&lt;top&gt;", "0.0", "80.0"),
        ("sh-bar", "random", "80.0", "20.0"),
        ("sh-bar", "missing", "80.0", "0.0"),
    ]
    assert document.count("<h4>") == 1
    with pytest.raises(ConfigError, match="no bars"):
        charts.bars_html({"a": {"b": math.nan}})


def test_curves_pass_through_their_values():
    """The first point of each line lies at its share of the height, ends are named apart, and one line stands out."""
    document = charts.curves_svg(
        ["1", "2", "5"], {"top": [100, 50, 0], "random": [100, 100, 4]}, high=100, highlight=["top"], label="<stay>"
    )
    Checker(document)
    found = re.findall(r'points="([^"]*)"', document)
    top, random = ([tuple(map(float, point.split(","))) for point in line.split()] for line in found)
    assert top[0][1] == random[0][1] < top[1][1] < top[2][1]
    assert top[1][1] == pytest.approx((top[0][1] + top[2][1]) / 2)
    assert document.count('stroke="rgb(40,110,225)"') == 1
    heights = [float(y) for y in re.findall(r'y="([\d.]+)"[^>]*>(?:top|random)<', document)]
    assert abs(heights[0] - heights[1]) >= 12
    with pytest.raises(ConfigError, match="3 ticks"):
        charts.curves_svg(["1", "2", "5"], {"top": [1]}, high=1)


def test_counted_words_are_marked_and_nothing_else():
    """Whole words, whatever their case; markup in the text stays text."""
    shown = charts.marked_html("Isles, islesmen & <b>the ISLES</b>", {"isles"})
    assert shown.count("<mark") == 2
    assert "islesmen &amp; &lt;b&gt;the <mark" in shown
    row = html.table_html([{"text": shown, "plain": "<b>"}])
    assert "<mark" in row
    assert "&lt;b&gt;</td>" in row
