"""The pages in a real browser: Chromium, headless, by its driver.

Skipped where there is no Chromium, no driver or no selenium (the extra `dev`).
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("selenium", reason="the browser is driven by selenium, in `dev`")
pytest.importorskip("jinja2", reason="pages need the extra `pages`")

from selenium.webdriver import ActionChains, Chrome, ChromeOptions, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

from crosscheck import html
from crosscheck.atlas import atlas
from crosscheck.cases import case_names, load_case
from crosscheck.compare import compare
from crosscheck.trace import trace
from microgpt.backend import fresh_state
from microgpt.pages.run_report import report
from microgpt.taps import params, taps

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
DRIVER = shutil.which("chromedriver") or ""
WIDTHS = (360, 800, 1000, 1600)
HOSTILE = "<img src=https://example.com/x onerror=alert(1)>"
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)

# the contrast of every text with what is behind it, by WCAG's formula; those below the least
CONTRASTS = """
function channels(text) {
  const found = text.match(/[\\d.]+/g).map(Number);
  return found.length === 3 ? [...found, 1] : found;
}
function over(top, under) {
  return [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat([1]);
}
function luminance(color) {
  const [r, g, b] = color.map(c => c / 255).map(
    c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function behind(element) {
  if (!element) return matchMedia("(prefers-color-scheme: dark)").matches ?
    [0, 0, 0, 1] : [255, 255, 255, 1];
  const own = channels(getComputedStyle(element).backgroundColor);
  return own[3] === 1 ? own : over(own, behind(element.parentElement));
}
const found = {}, walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let count = 0;
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
  const style = getComputedStyle(element), back = behind(element);
  const front = over(channels(style.color), back);
  const [a, b] = [luminance(front), luminance(back)];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  count += 1;
  if (ratio < arguments[0]) found[element.tagName + "." + element.className] = ratio;
}
return [count, found];
"""


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    if not (CHROMIUM and DRIVER):
        pytest.skip("there is no chromium with its chromedriver")
    options = ChromeOptions()
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(option)
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options, Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory, words: Path, tiny: dict[str, str]) -> Any:
    """Every kind of page, by name."""
    folder = tmp_path_factory.mktemp("pages")
    made: dict[str, str] = {}

    def page(name: str) -> Path:
        path = folder / f"{name}.html"
        if not path.exists():
            made[name] = PAGES[name](folder)
            path.write_text(made[name], encoding="utf-8")
        return path

    return page


def draw_atlas(name: str, update: bool = False) -> str:
    case = load_case(name)
    return atlas(case, fresh_state(case.params), name, update)


def draw_map(wrong: bool) -> str:
    case = load_case("three-layers")
    if wrong:
        case = type(case)(**{**vars(case), "name": HOSTILE})
    steps = list(trace(case, "vectorized", "float64", 3))
    if wrong:
        steps[1]["backward/dlayer1.attn_logits"] *= 1.01
        steps[1]["gradient/dwte"] *= 1.01
    outcome = compare(case, trace(case, "scalar", "float64", 3), steps)
    return html.of_outcomes("traces", [outcome], "ours", HOSTILE if wrong else "theirs")


def draw_report(folder: Path, count: int) -> str:
    from microgpt.settings import load_config
    from microgpt.train import new_run

    data = folder / "words.txt"
    data.write_text("emma\nzo\u00e9\nana\nmia\n" * 5, encoding="utf-8")
    names = [f"{i} {HOSTILE.replace('/', '')}" if count > 1 else "run" for i in range(count)]
    for i, name in enumerate(names):
        overrides = {"steps": "30", "dataset": str(data), "held_out": "4", "eval_every": "10"}
        config = load_config(overrides={**overrides, "seed": str(i % 2), "num_samples": "5"})
        with new_run(config, "vectorized", folder / f"{count}" / name, "") as run:
            run.train(lambda *_: None)
        (folder / f"{count}" / name / "samples.txt").write_text("emma\n<b>x</b>\n", "utf-8")
    return report([folder / f"{count}" / name for name in names])


PAGES: dict[str, Callable[[Path], str]] = {
    "atlas": lambda _: draw_atlas("one-document", update=True),
    "atlas-three-layers": lambda _: draw_atlas("three-layers"),
    "atlas-tied": lambda _: draw_atlas("microgpt-243"),
    "map": lambda _: draw_map(False),
    "map-wrong": lambda _: draw_map(True),
    "report": lambda folder: draw_report(folder, 1),
    "report-20": lambda folder: draw_report(folder, 20),
}


def shown(browser: Chrome, path: Path, width: int = 1600, dark: bool = False) -> None:
    """Open a page at a width, light or dark."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)  # what came before is not this page's
    browser.get(path.as_uri())


def requests(browser: Chrome) -> list[str]:
    """The addresses that a page asked for, other than its own."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in asked if not url.startswith("data:") and url != browser.current_url]


def complaints(browser: Chrome) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_asks_for_nothing_and_complains_of_nothing(
    browser: Chrome, pages: Any, name: str
) -> None:
    shown(browser, pages(name))
    assert complaints(browser) == []
    assert requests(browser) == []
    assert browser.title
    assert "<img" not in browser.title or HOSTILE[:4] in browser.title


def test_a_request_and_an_error_are_found(browser: Chrome, pages: Any, tmp_path: Path) -> None:
    text = pages("map").read_text(encoding="utf-8")
    beyond = tmp_path / "beyond.png"
    planted = {
        "policy": text.replace("</body>", f'<img src="{beyond.as_uri()}"></body>'),
        "none": text.replace("Content-Security-Policy", "x").replace(
            "</body>", f'<img src="{beyond.as_uri()}"></body>'
        ),
        "script": text.replace("</body>", "<script>alert(1)</script></body>"),
    }
    found = {}
    for name, page in planted.items():
        path = tmp_path / f"{name}.html"
        path.write_text(page, encoding="utf-8")
        shown(browser, path)
        found[name] = bool(complaints(browser)), bool(requests(browser))
    assert found["policy"][0]
    assert found["script"][0]
    assert found["none"][1]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_its_window(browser: Chrome, pages: Any, name: str, width: int) -> None:
    shown(browser, pages(name), width)
    inner, wide, window = browser.execute_script(
        "const page = document.documentElement;"
        "return [innerWidth, page.scrollWidth, page.clientWidth]"
    )
    assert inner == width
    assert wide <= window


# elements that are wider inside than outside, unless the arrow keys scroll them
CUT = """
return Array.from(document.querySelectorAll("main *, header *"))
  .filter(one => one.scrollWidth > one.clientWidth + 1 && one.clientWidth > 0)
  .filter(one => getComputedStyle(one).overflowX !== "visible" && one.tabIndex !== 0)
  .map(one => one.tagName + "." + one.className);
"""
WIDER = (
    "return Array.from(document.querySelectorAll('pre, table, dl, .figures'))"
    ".filter(one => one.scrollWidth > one.clientWidth + 1).map(one => one.outerHTML)"
)
SCROLLED = "return document.querySelectorAll('.stop .scroll, .how .scroll, .texts .scroll').length"


@pytest.mark.parametrize("width", [360, 1000, 1600])
@pytest.mark.parametrize("name", ["atlas", "atlas-three-layers"])
def test_nothing_in_the_atlas_is_cut_off(
    browser: Chrome, pages: Any, name: str, width: int
) -> None:
    shown(browser, pages(name), width)
    assert browser.execute_script(CUT) == []
    assert browser.execute_script(SCROLLED) == 0
    assert browser.execute_script(WIDER) == []


def test_a_link_to_a_parameter_leads_to_its_weights(browser: Chrome, pages: Any) -> None:
    shown(browser, pages("atlas"))
    browser.find_element("css selector", "#emb a[href='#wte']").click()
    title, top = browser.execute_script(
        "const one = document.querySelector('#wte h5');"
        "return [one.textContent, one.getBoundingClientRect().top]"
    )
    assert title == "the weights, wte"
    header = browser.execute_script(
        "return document.querySelector('#dwte > header').getBoundingClientRect().bottom"
    )
    assert header <= top < 300


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_every_text_has_a_contrast_of_4_5_to_1(
    browser: Chrome, pages: Any, name: str, dark: bool
) -> None:
    shown(browser, pages(name), dark=dark)
    count, faint = browser.execute_script(CONTRASTS, 4.5)
    assert count > 100
    assert faint == {}
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(20, 23, 27)") is dark


def test_a_faint_text_is_found(browser: Chrome, pages: Any) -> None:
    shown(browser, pages("map"))
    browser.execute_script("document.querySelector('h1').style.color = '#999'")
    _, faint = browser.execute_script(CONTRASTS, 4.5)
    assert list(faint) == ["H1."]


@pytest.mark.parametrize("name", case_names())
def test_the_arrow_keys_walk_through_every_tap_of_a_case(
    browser: Chrome, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "atlas.html"
    path.write_text(draw_atlas(name), encoding="utf-8")
    shown(browser, path)
    browser.execute_script(
        "window.visited = []; addEventListener('focusin', event => {"
        " const stop = event.target.closest('[data-stop]'); if (stop) visited.push(stop.id); })"
    )
    stops = browser.execute_script(
        "return Array.from(document.querySelectorAll('[data-stop]'), stop => stop.id)"
    )
    forward = list(taps(load_case(name).config))
    back = [f"d{tap}" for tap in reversed(forward)]
    homes = [f"d{param}" for param in params(load_case(name).config)]
    assert [stop for stop in stops if stop not in homes] == forward + back
    assert set(homes) < set(stops)
    ActionChains(browser, duration=0).send_keys(Keys.ARROW_RIGHT * len(stops)).perform()
    assert browser.execute_script("return visited") == stops
    ActionChains(browser, duration=0).send_keys(Keys.ARROW_LEFT * len(stops)).perform()
    assert browser.execute_script("return visited") == stops + stops[-2::-1]


def test_the_arrow_keys_begin_at_the_stop_in_view(browser: Chrome, pages: Any) -> None:
    shown(browser, pages("atlas"))
    browser.get(pages("atlas").as_uri() + "#emb")
    browser.execute_script(
        "document.getElementById('dlayer0.k').scrollIntoView(); scrollBy(0, 300)"
    )
    ActionChains(browser, duration=0).send_keys(Keys.ARROW_RIGHT).perform()
    here = "const one = document.activeElement; return [one.tagName, one.closest('article')?.id]"
    assert browser.execute_script(here) == ["H3", "dlayer0.attn_wk"]
    browser.execute_script("scrollTo(0, 0)")
    ActionChains(browser, duration=0).send_keys(Keys.ARROW_RIGHT).perform()
    assert browser.execute_script(here) == ["H3", "emb"]


def test_a_link_to_a_stop_moves_the_focus_to_its_heading(browser: Chrome, pages: Any) -> None:
    shown(browser, pages("atlas"))
    browser.find_element("css selector", "#walk ~ .groups a[href='#dlayer0.k']").send_keys(
        Keys.ENTER
    )
    focused = "return document.activeElement.textContent.split(' ')[0]"
    WebDriverWait(browser, 20).until(lambda _: browser.execute_script(focused) == "dk")
    skip = browser.find_element("css selector", ".skip")
    assert skip.get_attribute("href").endswith("#stops")


def test_the_tab_key_reaches_every_tap_and_enter_opens_it(browser: Chrome, pages: Any) -> None:
    shown(browser, pages("atlas-three-layers"))
    browser.execute_script(
        "window.reached = []; addEventListener('focusin', event => {"
        " reached.push(event.target.getAttribute('href')); })"
    )
    forward = list(taps(load_case("three-layers").config))
    ActionChains(browser, duration=0).send_keys(Keys.TAB * (3 * len(forward) + 30)).perform()
    reached = browser.execute_script("return reached")
    assert {f"#{tap}" for tap in forward} | {f"#d{tap}" for tap in forward} <= set(reached)
    browser.execute_script("document.querySelector(\"a[href='#dlayer2.k']\").focus()")
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert browser.current_url.endswith("#dlayer2.k")
    top = "return document.getElementById('dlayer2.k').getBoundingClientRect().top"
    assert -1 <= browser.execute_script(top) < 100


def test_without_script_every_stop_is_on_the_page(
    browser: Chrome, pages: Any, tmp_path: Path
) -> None:
    path = tmp_path / "atlas.html"
    text = pages("atlas").read_text(encoding="utf-8")
    path.write_text(text.partition("<script>")[0] + "</body></html>", encoding="utf-8")
    shown(browser, path)
    hidden = browser.execute_script(
        "return Array.from(document.querySelectorAll('[data-stop]'))"
        ".filter(stop => stop.getBoundingClientRect().height < 50).length"
    )
    assert hidden == 0


@pytest.mark.parametrize("name", ["atlas", "map-wrong", "report"])
def test_a_page_prints(browser: Chrome, pages: Any, name: str) -> None:
    shown(browser, pages(name))
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert printed.startswith(b"%PDF")
    assert printed.count(b"/Type /Page\n") >= 2 or len(printed) > 20_000


def test_on_paper_nothing_is_cut_off_and_headings_stay_with_what_follows(
    browser: Chrome, pages: Any
) -> None:
    shown(browser, pages("atlas"), 720)  # as wide as A4 in portrait
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert browser.execute_script(WIDER) == []
    kept = (
        "const [names, property] = arguments;"
        "return names.map(one => getComputedStyle(document.querySelector(one))[property])"
    )
    headings = ["h2", ".stop h3", ".stop h4", ".stop caption"]
    assert set(browser.execute_script(kept, headings, "breakAfter")) == {"avoid"}
    assert browser.execute_script(kept, [".stop .worked"], "breakInside") == ["avoid"]


def test_the_map_opens_at_the_first_divergence(browser: Chrome, pages: Any) -> None:
    shown(browser, pages("map-wrong"))
    heading = browser.execute_script(
        "const one = document.querySelector('.divergence h2');"
        "return [one.textContent, one.getBoundingClientRect().bottom, innerHeight]"
    )
    assert "dlayer1.attn_logits disagrees" in heading[0]
    assert heading[1] < heading[2]


def test_a_picture_is_drawn_in_its_colours(browser: Chrome, pages: Any) -> None:
    shown(browser, pages("atlas"))
    drawn = browser.execute_script(
        "const image = document.querySelector('.stop img');"
        "const canvas = document.createElement('canvas');"
        "canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;"
        "const context = canvas.getContext('2d'); context.drawImage(image, 0, 0);"
        "return [canvas.width, canvas.height,"
        " Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data)]"
    )
    case = load_case("one-document")
    emb = next(trace(case, "scalar", "float64", 1))["forward/emb"][0]
    width, height, data = drawn
    assert (height, width) == emb.shape
    opacity = np.array(data).reshape(height, width, 4)[..., 3] / 255
    np.testing.assert_allclose(opacity, np.abs(emb) / np.abs(emb).max(), atol=0.03)


SCREENSHOTS = os.environ.get("MICROGPT_SCREENSHOTS")  # a folder to look at the pages in


@pytest.mark.skipif(not SCREENSHOTS, reason="MICROGPT_SCREENSHOTS names no folder for pictures")
@pytest.mark.parametrize("name", PAGES)
def test_screenshots(browser: Chrome, pages: Any, name: str) -> None:
    folder = Path(SCREENSHOTS or "")
    folder.mkdir(parents=True, exist_ok=True)
    for width in WIDTHS:
        for scheme in ("light", "dark"):
            shown(browser, pages(name), width, scheme == "dark")
            browser.save_screenshot(str(folder / f"{name}-{width}-{scheme}.png"))
