"""The pages in a real browser: nothing goes wrong, nothing is asked for, sorting and filtering work, a phone can read
it."""

import pytest

from lib.run import pages
from lib.run.pages import ASSETS
from tests.browser import PROGRAM, browser
from tests.test_report import outputs  # noqa: F401 (a fixture)

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine")

FIRST = "[...document.querySelectorAll('table.runs')].filter(t => t.tBodies[0].rows.length > 2)[0]"
SHOWN = f"[...{FIRST}.tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[0].textContent.trim()).join(' ')"
CONTRAST = """
(() => {
  const linear = x => { x /= 255; return x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4; };
  const lum = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(linear);
    return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
  const ground = e => { while (e) { const c = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$|transparent/.test(c)) return c; e = e.parentElement; } return 'rgb(255,255,255)'; };
  const bad = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!e.offsetParent || !own || e.matches('.point, .skip, script')) continue;
    const [a, b] = [lum(getComputedStyle(e).color), lum(ground(e))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) bad.push(e.tagName + ': ' + e.textContent.slice(0, 40));
  }
  return bad;
})()
"""
# What goes on beyond its edge, and neither says so nor shows a shadow there.
UNCUED = """
[...document.querySelectorAll('body *')].filter(e => e.scrollWidth > e.clientWidth + 1
    && /auto|scroll/.test(getComputedStyle(e).overflowX) && e.offsetParent && !e.matches('pre, math'))
  .filter(e => !/gradient/.test(getComputedStyle(e).backgroundImage) && !/swipe/.test(getComputedStyle(e, '::before').content))
  .map(e => e.outerHTML.slice(0, 80))
"""


@pytest.fixture(scope="module")
def page():
    with browser() as opened:
        yield opened


@pytest.fixture
def index(outputs):  # noqa: F811
    return pages.index_html(outputs).as_uri()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_ask_for_nothing_and_fit(page, index, width, dark):
    member = index.replace("index.html", "laptop-full/td_dpo/dpo/run.html")
    for url in (index, member):
        page.open(url, width=width, dark=dark)
        assert page.reported == []
        assert [a for a in page.asked if a != url and not a.startswith("data:")] == []
        assert page.ask("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
        assert page.ask(CONTRAST) == []
        assert page.ask(UNCUED) == [], "what is cut has no cue"
    page.open(index.replace("index.html", "method/td_dpo.html"), width=width, dark=dark)
    assert page.ask("document.documentElement.scrollWidth") <= width
    assert page.reported == []


def test_a_phone_sees_a_card_whole_and_a_cue_where_a_figure_goes_on(page, index):
    page.open(index, width=390)
    box = "(e => [e.left, e.right])(document.querySelector('%s').getBoundingClientRect())"
    for part in (".card", ".card svg", ".card h4"):
        left, right = page.ask(box % part)
        assert 0 <= left < right <= 390, part
    assert page.ask("document.querySelector('figure').scrollWidth > 390")
    assert "swipe" in page.ask("getComputedStyle(document.querySelector('figure'), '::before').content")
    page.open(index, width=1280)
    assert page.ask("getComputedStyle(document.querySelector('figure'), '::before').content") == "none"


def test_runs_are_sorted_and_filtered_by_keyboard(page, index):
    page.open(index)
    assert page.ask(SHOWN) == "discopop dpo td_dpo"
    page.ask(f"{FIRST}.querySelectorAll('th button')[2].focus()")
    page.press("Enter")
    assert page.ask(SHOWN) == "dpo td_dpo discopop", "by key metric, what has none last"
    page.press("Enter")
    assert page.ask(SHOWN) == "td_dpo dpo discopop"
    assert page.ask(f"{FIRST}.querySelectorAll('th')[2].getAttribute('aria-sort')") == "descending"
    field = "document.querySelector('input[type=search]')"
    page.ask(f"(f => {{ f.value = 'DIVERGED td'; f.dispatchEvent(new Event('input')); }})({field})")
    assert page.ask(SHOWN) == "td_dpo"
    assert page.ask("document.querySelector('[role=status]').textContent") == "1 of 3 runs"
    assert page.reported == []


def test_a_point_is_clicked_and_the_row_of_its_run_opens(page, index):
    page.open(index)
    box = "(r => [r.x, r.y, r.width, r.height])(document.querySelector('%s').getBoundingClientRect())"
    point, picture = page.ask(box % "a.point"), page.ask(box % "figure img")
    assert abs(point[0] + point[2] / 2 - (picture[0] + 0.25 * picture[2])) < 1
    assert abs(point[1] + point[3] / 2 - (picture[1] + 0.5 * picture[3])) < 1
    assert page.ask("document.querySelector('a.point').textContent") == "dpo, seed 42: 7.25"
    page.ask("document.querySelector('a.point').click()")
    page.arrived(index.replace("index.html", "laptop-full/td_dpo/dpo/run.html#beta0.05-s42"))
    assert page.ask("document.querySelector(':target th').textContent") == "beta0.05-s42"


def test_the_keyboard_reaches_the_content_first(page, index):
    page.open(index)
    page.press("Tab")
    assert page.ask("document.activeElement.textContent") == "Skip to the content"
    assert page.ask("getComputedStyle(document.activeElement).left") != "-15984px", "it is seen once it has the focus"


def test_text_of_a_data_set_does_not_act(page, index):
    page.open(index.replace("index.html", "laptop-full/td_dpo/dpo/run.html"))
    assert page.ask("document.querySelectorAll('script, img').length") == 0
    assert "<script>alert('data')</script>" in page.ask("document.body.textContent")
    assert (ASSETS / "table.js").exists()
