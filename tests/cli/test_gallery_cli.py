"""``python -m vistok.eval gallery``: from measured runs to a page, and the page in a browser."""

import base64
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tiny_models.exports import export_generator, export_tokenizer
from tiny_models.vgg import alexnet_file, vgg16_file
from vistok.cli import main
from vistok.eval.__main__ import run

DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def evaluate(*words):
    """``python -m vistok.eval words`` in this process; the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vistok.eval", *map(str, words)])
        try:
            main(run)
        except SystemExit as stop:
            return stop.code
    return 0


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two runs: one of a tokenizer and a generator, one of another tokenizer."""
    root = tmp_path_factory.mktemp("runs")
    export_tokenizer(root / "one/tokenizer", steps=2)
    export_generator(root / "one/generator", root / "one/tokenizer", [])
    export_tokenizer(root / "two", num_registers=4)
    words = ("reconstruction", "--data", "digits", "--count", 10)
    for run_, more in (("one/tokenizer", ("--steps", "1,3")), ("two", ("--lpips", f"vgg:{vgg16_file()}"))):
        assert evaluate(*words, "--checkpoint", root / run_, *more) == 0
    words = ("generation", "--data", "digits", "--count", 12, "--no-copies", "--tokens", "1,8")
    assert evaluate(*words, "--checkpoint", root / "one/generator") == 0
    losses = "".join(f"{update},{1 / update},\n" for update in range(1, 1001))
    (root / "one/tokenizer/metrics.csv").write_text("update,train/loss,val/loss\n" + losses + "1000,,0.5\n")
    return root


@pytest.fixture(scope="module")
def page(measured):
    out = measured / "gallery.html"
    assert evaluate("gallery", "--runs", measured / "one", measured / "two", "--out", out) == 0
    return out


def content(page):
    return json.loads(DATA.search(page.read_text()).group(1))


def test_a_page_holds_what_was_measured(measured, page):
    data = content(page)
    assert data["runs"] == ["one/generator", "one/tokenizer", "two"]
    one, two = data["reconstructions"]
    assert [frame["count"] for frame in one["series"]["tokens"]] == [1, 2, 4, 8]
    assert [frame["count"] for frame in one["series"]["steps"]] == [1, 3]
    assert [frame["count"] for frame in two["series"]["tokens"]] == [1, 2, 4]
    result = json.loads((measured / "one/tokenizer/eval/reconstruction.json").read_text())
    first = one["series"]["tokens"][0]
    assert float(first["figures"]["psnr_db"]) == pytest.approx(result["metrics"]["tokens"]["1"]["psnr_db"], rel=1e-3)
    assert one["protocol"] == result["fingerprint"]
    strip = (measured / "one/tokenizer/eval/reconstruction_strips/tokens_1.png").read_bytes()
    assert first["picture"]["source"] == f"data:image/png;base64,{base64.b64encode(strip).decode()}"
    assert (one["original"]["width"], one["original"]["height"]) == (160, 16)
    assert [item["task"] for item in data["samples"]] == ["generation"]
    charts = {(chart["axis"], chart["title"]): chart for chart in data["charts"]}
    assert [line["run"] for line in charts["tokens", "psnr_db"]["lines"]] == ["one/tokenizer", "two"]
    assert [count for count, _ in charts["steps", "psnr_db"]["lines"][0]["points"]] == [1, 3]
    assert "real" in charts["tokens", "class_accuracy"] or charts["tokens", "gFID-12 (digits-cnn features)"]["real"] > 0
    (losses,) = data["losses"]
    assert {line["run"]: line["points"][0] for line in losses["lines"]} == {
        "train/loss": [1.0, 1.0],
        "val/loss": [1000.0, 0.5],
    }
    assert all(len(line["points"]) <= 300 for line in losses["lines"])
    tables = {table["title"]: table for table in data["tables"]}
    assert [row["what"] for row in tables["reconstruction"]["rows"]][:6] == [
        *("1 token", "2 tokens", "4 tokens", "8 tokens"),
        *("1 step", "3 steps"),
    ]
    assert tables["codebook"]["rows"][0]["cells"]["codes"] == "80"
    kinds = {protocol["fingerprint"]: protocol for protocol in data["protocols"]}
    assert len(kinds) == 3 and kinds.keys() >= {row["protocol"] for row in tables["reconstruction"]["rows"]}
    assert any("tokens: [1, 2, 4] / [1, 2, 4, 8]" in line for line in kinds[two["protocol"]]["differences"])
    text = DATA.sub("", page.read_text())
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_strips_show_the_first_images_pixel_by_pixel(measured):
    folder = measured / "one/tokenizer/eval/reconstruction_strips"
    names = {path.stem for path in folder.iterdir()}
    assert names == {"original", *(f"tokens_{n}" for n in (1, 2, 4, 8)), "steps_1", "steps_3"}
    strips = {path.stem: np.asarray(Image.open(path)) for path in folder.iterdir()}
    assert all(strip.shape == (16, 160, 3) for strip in strips.values())
    assert (strips["tokens_8"] != strips["tokens_1"]).any() and (strips["steps_1"] != strips["steps_3"]).any()


def test_pretrained_comparisons_stand_in_the_result(measured, tmp_path, capsys):
    result = json.loads((measured / "two/eval/reconstruction.json").read_text())
    distances = [row["LPIPS (vgg)"] for row in result["metrics"]["tokens"].values()]
    assert len(distances) == 3 and min(distances) > 0
    assert re.search("network and heads [0-9a-f]{64}", result["protocol"]["definitions"]["LPIPS (vgg)"])
    words = ("reconstruction", "--checkpoint", measured / "two", "--data", "digits", "--out", tmp_path / "out")
    for more, message in (
        (("--lpips", f"alex:{alexnet_file()}"), "--lpips: LPIPS by alex needs images of at least 31 px, got 16"),
        (("--similarity", tmp_path / "none"), "--similarity: no such folder"),
        (("--steps", "0,2"), "--steps: at least 1, got 0"),
    ):
        assert evaluate(*words, *more) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_missing_or_damaged_is_one_line(measured, tmp_path, capsys):
    def refused(*parts):
        assert evaluate("gallery", "--runs", tmp_path / "run", "--out", tmp_path / "page.html") == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ") and line.count("\n") == 1
        for part in parts:
            assert part in line

    refused("no such folder", "run")
    (tmp_path / "run").mkdir()
    refused("run holds no results", "python -m vistok.eval reconstruction --checkpoint")
    shutil.copytree(measured / "one/tokenizer/eval", tmp_path / "run/eval")
    strips = tmp_path / "run/eval/reconstruction_strips"
    (strips / "tokens_2.png").write_bytes((strips / "tokens_2.png").read_bytes()[:60])
    refused("tokens_2.png", "cannot read")
    (strips / "tokens_2.png").unlink()
    with pytest.warns(UserWarning, match=r"tokens_2\.png is missing"):
        assert evaluate("gallery", "--runs", tmp_path / "run", "--out", tmp_path / "page.html") == 0
    (item,) = content(tmp_path / "page.html")["reconstructions"]
    assert [frame["count"] for frame in item["series"]["tokens"]] == [1, 4, 8]
    shutil.rmtree(strips)
    with pytest.warns(UserWarning, match="reconstruction_strips is missing: no slider"):
        assert evaluate("gallery", "--runs", tmp_path / "run", "--out", tmp_path / "page.html") == 0
    assert content(tmp_path / "page.html")["samples"][0]["task"] == "reconstruction"
    (tmp_path / "run/eval/reconstruction.json").write_text("{")
    capsys.readouterr()
    refused("reconstruction.json is not an evaluation result")
    (tmp_path / "page.html").unlink()
    refused("reconstruction.json")
    assert not (tmp_path / "page.html").exists()


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chrome = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chrome and driver):
        pytest.skip("no Chromium with its chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chrome
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.add_argument("--window-size=1100,1400")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as browser:
        yield browser


def test_a_slider_changes_the_picture_in_a_browser(browser, measured, page):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    def find(selector):
        return browser.find_element(By.CSS_SELECTOR, selector)

    def shown(name):
        """Whether the page shows this strip of the first run."""
        strip = (measured / f"one/tokenizer/eval/reconstruction_strips/{name}.png").read_bytes()
        picture = find('[data-run="one/tokenizer"] .pair i:last-child').value_of_css_property("background-image")
        return base64.b64encode(strip).decode() in picture

    browser.get(Path(page).as_uri())
    card = '[data-run="one/tokenizer"] '
    slider, pair = find(card + "[data-series=tokens] input"), find(card + ".pair")
    assert shown("tokens_8") and slider.get_attribute("value") == "3"
    before, figures = pair.screenshot_as_png, find(card + ".figures").text
    left = ActionChains(browser).move_to_element_with_offset(slider, 4 - slider.size["width"] // 2, 0)
    left.click().perform()
    assert shown("tokens_1") and slider.get_attribute("value") == "0"
    assert pair.screenshot_as_png != before and find(card + ".figures").text != figures
    assert "from 1 token" in find(card + ".legend").text
    slider.send_keys("\ue014")  # the arrow to the right
    assert shown("tokens_2")
    find(card + "[data-series=tokens] button:last-child").click()
    assert shown("tokens_8") and pair.screenshot_as_png == before
    find(card + "[data-series=steps] input").send_keys("\ue012")  # the arrow to the left
    assert shown("steps_1")

    assert len(browser.find_elements(By.CSS_SELECTOR, "svg polyline")) >= 4
    assert "one/generator" in find("#figures").text and "usage" in find("#figures").text
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    browser.set_window_size(500, 900)
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
