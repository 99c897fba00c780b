"""The page of all latents, in a headless Chromium: no script errors, search, click, keys, light and dark, narrow."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess

import pytest
import torch

import saehooks as sh
from saehooks.errors import ConfigError
from saehooks.latents import page as pages

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

DRIVER = """<script>
const results = {errors: []};
window.addEventListener('error', e => results.errors.push(e.message));
window.addEventListener('unhandledrejection', e => results.errors.push(String(e.reason)));
const press = (key, target) => target.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
const rows = () => [...document.querySelectorAll('.row')];
const title = () => document.querySelector('#latent h2').textContent;
function search(text) {
  const input = document.getElementById('search');
  input.value = text;
  input.dispatchEvent(new Event('input'));
  return rows().map(r => +r.dataset.latent);
}
function drive() {
  if (!document.body.dataset.ready) return setTimeout(drive, 20);
  try { script(); } catch (e) { results.errors.push(String(e.stack)); }
  const pre = document.createElement('pre');
  pre.id = 'results';
  pre.textContent = JSON.stringify(results);
  document.body.append(pre);
}
function script() { %s }
drive();
</script>"""


def driven(file, tmp_path, script: str, *flags: str) -> dict:
    """What a script that acts as a reader found on a page."""
    page = file.read_text(encoding="utf-8")
    driver = DRIVER % script
    copy = tmp_path / "driven.html"
    copy.write_text(page.replace("<script id=", driver + "<script id=", 1), encoding="utf-8")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=20000", "--dump-dom", *flags, f"file://{copy}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r'<pre id="results">(.*?)</pre>', dom, re.S)
    assert found, dom[-2000:]
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def read_back(page: str) -> dict:
    """The data of a page, unpacked as its script does."""
    import gzip

    packed = re.search(r'<script id="data" type="text/plain">(.*?)</script>', page, re.S)[1]
    body = gzip.decompress(base64.b64decode(packed))
    size = int.from_bytes(body[:4], "little")
    head = json.loads(body[4 : 4 + size])
    kinds = {"f4": torch.float32, "u4": torch.int32, "u2": torch.int16, "u1": torch.uint8}
    for name, (kind, start, length) in head["arrays"].items():
        width = int(kind[1])
        raw = bytearray(body[start : start + length * width])
        head[name] = torch.frombuffer(raw, dtype=kinds[kind]) if length else torch.zeros(0)
    return head


@pytest.fixture(scope="module")
def page(nasty_index, tmp_path_factory):
    effects = torch.zeros(96)
    effects[11] = -5.0
    return nasty_index.page(tmp_path_factory.mktemp("page") / "latents.html", title="A <page>", effects=effects)


def test_a_page_carries_the_index(page, nasty_index):
    """Counts, quantiles, contexts with their shades, tokens and neighbours are those of the index, self-contained."""
    text = page.read_text(encoding="utf-8")
    assert "A &lt;page&gt;" in text
    assert text.count("</script>") == 2
    assert not re.search(r'(src|href)="(?!data:|#)', text.split('<script id="data"')[0])
    assert "http" not in text.split('<script id="data"')[0]
    data = read_back(text)
    assert data["counts"].tolist() == nasty_index.counts.tolist()
    assert data["positions"] == nasty_index.positions
    assert torch.allclose(data["quantiles"].reshape(96, -1)[:, 20], nasty_index.quantiles[:, 50])
    latent = int(nasty_index.counts.argmax())
    context, place = nasty_index.contexts(latent)[0], int(data["first"][latent])
    assert data["value"][place] == context.value
    span = slice(int(data["start"][place]), int(data["start"][place + 1]))
    assert [data["pieces"][i] for i in data["tokens"][span]] == [nasty_index.piece(token) for token in context.tokens]
    shades, values = data["values"][span].float(), torch.tensor(context.values)
    assert (shades == 255).tolist() == values.isnan().tolist()
    high = nasty_index.quantile(latent, 1.0)
    assert torch.allclose(
        shades.where(~values.isnan(), torch.zeros(())) / 254 * high, values.nan_to_num(), atol=high / 250
    )
    raised = [data["pieces"][i] for i in data["raises"].reshape(96, -1)[latent]]
    assert raised == [piece for piece, _ in nasty_index[latent].raises]
    assert data["effects"][11] == -5


@needs_browser
def test_a_reader_searches_sorts_clicks_and_steps(page, nasty_index, tmp_path):
    """Everything a person does, in a browser, without a script error."""
    found = driven(page, tmp_path, """
        results.shown = rows().length;
        results.numbered = search('42')[0];
        results.named = search('music');
        results.count = document.getElementById('count').textContent;
        press('Enter', document.getElementById('search'));
        results.entered = title();
        results.nothing = search('nosuchword').length;
        press('Escape', document.getElementById('search'));
        const sort = document.getElementById('sort');
        results.orders = [...sort.options].map(o => o.value);
        for (const order of results.orders) {
          sort.value = order;
          sort.dispatchEvent(new Event('change'));
          results[order] = rows().map(r => +r.dataset.latent).slice(0, 5);
        }
        rows()[2].click();
        results.clicked = [title(), location.hash];
        press('ArrowDown', document.body); results.down = title();
        press('k', document.body); press('k', document.body); results.up = title();
        const near = document.querySelector('.near button');
        near.click();
        results.near = [near.dataset.latent, title()];
        results.contexts = document.querySelectorAll('.context').length;
        results.peaks = document.querySelectorAll('.peak').length;
        results.markup = document.querySelectorAll('#latent b, #rows i:not(.bar i)').length;
        results.svg = document.querySelectorAll('svg.values rect').length;
        press('/', document.body); results.focus = document.activeElement.id;
        document.getElementById('theme').click(); results.theme = document.documentElement.dataset.theme;
    """)  # fmt: skip
    assert found["errors"] == []
    assert found["shown"] > 5
    assert found["numbered"] == 42
    assert found["named"] == [7]
    assert found["count"] == "1 latents"
    assert found["entered"].startswith("Latent 7 music <i>")
    assert found["nothing"] == 0
    by_density = sorted(range(96), key=lambda i: (-int(nasty_index.counts[i]), i))
    assert found["density"] == by_density[:5]
    assert found["effect"][0] == 11
    assert found["number"] == [0, 1, 2, 3, 4]
    last = found["orders"][-1]
    assert found["clicked"] == [found["clicked"][0], f"#{found[last][2]}"]
    assert found["clicked"][0].startswith(f"Latent {found[last][2]} ")
    assert found["down"].startswith(f"Latent {found[last][3]} ")
    assert found["up"].startswith(f"Latent {found[last][1]} ")
    assert found["near"][1].startswith(f"Latent {found['near'][0]} ")
    assert found["contexts"] == found["peaks"] > 5
    assert found["markup"] == 0
    assert found["svg"] > 5
    assert found["focus"] == "search"
    assert found["theme"] in ("light", "dark")


@needs_browser
@pytest.mark.parametrize(("flags", "dark"), [((), False), (("--force-dark-mode",), True)], ids=["light", "dark"])
@pytest.mark.parametrize("width", [500, 1280])
def test_it_fits_and_follows_the_readers_colours(page, tmp_path, width, flags, dark):
    """No sideways scrolling at any width; text stands out from its background in light and in dark."""
    found = driven(page, tmp_path, """
        const root = document.documentElement, style = getComputedStyle(document.body);
        results.overflow = root.scrollWidth - root.clientWidth;
        const lightness = c => c.match(/[\\d.]+/g).slice(0, 3).reduce((a, b) => a + +b, 0) / 765;
        results.paper = lightness(style.backgroundColor); results.ink = lightness(style.color);
        const beyond = e => e.getBoundingClientRect().right > root.clientWidth + 1;
        results.inside = [...document.querySelectorAll('#latent *')].filter(beyond).length;
    """, f"--window-size={width},900", *flags)  # fmt: skip
    assert found["errors"] == []
    assert found["overflow"] == 0
    assert found["inside"] == 0
    assert abs(found["paper"] - found["ink"]) > 0.6
    assert (found["paper"] < 0.5) == dark


@needs_browser
def test_images_are_drawn_with_their_patches(tiny_clip, tmp_path):
    """Pictures lie under the patches where a latent fires; labels are searched."""
    name = "visual.blocks.1.hook_resid_post"
    sae = sh.SAE(d_in=32, d_sae=48, activation="topk", dictionary="linear", k=4, hook_name=name).eval()
    labels = [f"kind{i} & co" for i in range(6)]
    index = sh.survey(tiny_clip, sae, [torch.rand(6, 3, 16, 16)], labels=labels)
    file = index.page(tmp_path / "clip.html")
    found = driven(file, tmp_path, """
        results.hits = search('kind3').length;
        rows()[0].click();
        results.images = [...document.querySelectorAll('figure image')].map(i => i.getAttribute('href').slice(0, 22));
        results.patches = document.querySelectorAll('figure rect').length;
        results.caption = document.querySelector('figure').textContent;
    """)  # fmt: skip
    assert found["errors"] == []
    assert found["hits"] > 0
    assert set(found["images"]) == {"data:image/png;base64,"}
    assert found["patches"] > 0
    assert "& co" in found["caption"]


def test_a_page_keeps_to_its_limit(nasty_index, tmp_path):
    """Fewer contexts are carried where the page would be too large; one that cannot fit is an error."""
    whole = nasty_index.page(tmp_path / "whole.html")
    small = nasty_index.page(tmp_path / "small.html", limit=whole.stat().st_size - 1)
    assert small.stat().st_size < whole.stat().st_size
    data = read_back(small.read_text(encoding="utf-8"))
    assert len(data["which"]) < len(read_back(whole.read_text(encoding="utf-8"))["which"])
    with pytest.raises(ConfigError, match="limit=1,000"):
        nasty_index.page(tmp_path / "no.html", limit=1000)
    assert not (tmp_path / "no.html").exists()
    with pytest.raises(ConfigError, match="96 latents, got 3"):
        nasty_index.page(tmp_path / "no.html", effects=[1, 2, 3])
    assert pages.LIMIT == 30_000_000
