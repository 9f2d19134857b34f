"""The page of `dat detect serve` in a browser: what a person does with it."""

import copy
import json
import re
import shutil
import subprocess

import pytest
import torch
from coco_scenes import write_scenes
from exporting import write_detector
from PIL import Image

from dat.detection import Detector
from dat.detection.config import DetectionConfig
from dat.detection.data import Category, read_coco
from dat.detection.evaluation import Evaluation
from dat.detection.report import write_report

pytest.importorskip("uvicorn", reason="the extra 'serve'")
playwright = pytest.importorskip("playwright.sync_api", reason="the extra 'test'")
app = pytest.importorskip("dat.detection.app", reason="the extra 'serve'")
serving = pytest.importorskip("serving", reason="the extra 'serve'").serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
MORE_OPTIONS = "--disable-component-update --disable-sync"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    path = write_detector(tmp_path_factory.mktemp("detector") / "best.pth", box_refine=True)
    detector = Detector.from_checkpoint(path, device="cpu")
    # scores all over 0..1
    for name, parameter in detector.model.named_parameters():
        if name.startswith("class_embed") and name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    return detector


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    # a browser's name may lead to a note that it is to be had elsewhere
    if subprocess.run([CHROMIUM, "--version"], capture_output=True).returncode:
        pytest.skip(f"{CHROMIUM} does not start")
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=CHROMIUM, args=f"{OPTIONS} {MORE_OPTIONS}".split()
        )
        yield context
        context.close()


@pytest.fixture
def page(browser, detector):
    """The page, which may ask nothing of any other server and must not fail inside."""
    asked, failed = [], []
    with serving(detector, app.Limits(upload=100_000)) as port:
        page = browser.new_page()
        page.set_default_timeout(30_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.goto(f"http://127.0.0.1:{port}/")
        yield page
        page.close()
    assert failed == []
    assert {url.split("/")[2] for url in asked if not url.startswith(("data:", "blob:"))} == {f"127.0.0.1:{port}"}


@pytest.fixture
def picture(tmp_path):
    """A picture that lies on its side, as cameras write them."""
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((180, 120), 80).convert("RGB").save(path, exif=exif)
    return path


def expected(detector, path):
    """What the server finds in a picture file: detections in COCO's format, by falling score."""
    return detector.predict(path, threshold=0).to_coco()


def slide(page, value):
    """Moves the slider of the least score."""
    page.locator("#threshold").evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input', {bubbles: true})); }", value
    )


def count(page, what):
    return int(page.locator("#canvas").get_attribute(f"data-{what}"))


def upload(page, path):
    slide(page, 0)
    page.set_input_files("#file", path)
    page.locator("#list button").first.wait_for()


def pixels(page):
    return page.evaluate("document.querySelector('#canvas').toDataURL()")


def test_boxes_follow_the_slider_and_a_click_shows_where_one_was_looked_for(page, detector, picture):
    assert page.get_by_label("Least score").is_hidden()
    upload(page, picture)
    found = [result for result in expected(detector, picture) if result["score"] >= 0.02]
    assert count(page, "boxes") == page.locator("#list button").count() == len(found)
    box = page.locator("#canvas").bounding_box()
    assert box["height"] / box["width"] == pytest.approx(180 / 120, rel=0.02)
    all_boxes = pixels(page)

    # a threshold between the third and the fourth
    least = round((found[2]["score"] + found[3]["score"]) / 2, 2)
    slide(page, least)
    assert count(page, "boxes") == sum(result["score"] >= least for result in found)
    assert page.locator("#value").inner_text() == f"{least:.2f}"
    some_boxes = pixels(page)
    assert some_boxes != all_boxes

    # the smallest of the boxes that the middle of one is in
    shown = [result["bbox"] for result in found if result["score"] >= least]
    x, y = shown[0][0] + shown[0][2] / 2, shown[0][1] + shown[0][3] / 2
    page.locator("#canvas").click(position={"x": x * box["width"] / 120, "y": y * box["height"] / 180})
    # levels, heads, points
    assert count(page, "points") == 4 * 2 * 4
    pressed = page.locator("#list button[aria-pressed=true]")
    over = [(w * h, i) for i, (a, b, w, h) in enumerate(shown) if a <= x <= a + w and b <= y <= b + h]
    # Two detections may have the same label and score.
    assert page.locator("#list button").all_inner_texts()[min(over)[1]] == pressed.inner_text()
    assert pixels(page) != some_boxes
    page.keyboard.press("Escape")
    assert count(page, "points") == 0
    assert pixels(page) == some_boxes


def test_everything_is_reached_by_keys(page, picture):
    upload(page, picture)
    page.locator("#file").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "threshold"
    page.keyboard.press("ArrowRight")
    assert page.locator("#value").inner_text() == "0.03"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert count(page, "points") > 0
    # the chosen one keeps the focus, and another press goes back
    assert page.locator("#list button").first.evaluate("button => button === document.activeElement")
    page.keyboard.press("Enter")
    assert count(page, "points") == 0


def test_what_is_wrong_is_said_and_the_page_goes_on(page, picture, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "cut.jpg").write_bytes(picture.read_bytes()[:-100])
    (tmp_path / "large.jpg").write_bytes(b"\0" * 100_001)
    page.get_by_text("images of up to 0.1 MB and 40 million pixels").wait_for()
    reasons = {
        "notes.txt": "not an image of a supported format",
        "cut.jpg": "cannot be read as an image",
        "large.jpg": "more than 0.1 MB",
    }
    for name, reason in reasons.items():
        page.set_input_files("#file", tmp_path / name)
        message = page.get_by_role("alert").filter(has_text=name)
        message.wait_for()
        assert reason in message.inner_text()
        assert page.locator("#canvas").is_hidden()
    upload(page, picture)
    assert page.get_by_role("alert").count() == 0
    page.get_by_text("found ").wait_for()


def test_names_of_classes_and_files_run_no_script(browser, detector, picture, tmp_path):
    nasty = "<img src=x onerror=alert(1)>"
    other = copy.copy(detector)
    other.categories = tuple(Category(category.id, f"{nasty}{category.id}") for category in detector.categories)
    path = tmp_path / f"{nasty}.jpg"
    path.write_bytes(picture.read_bytes())
    (tmp_path / f"{nasty}.txt").write_text("hello")
    dialogs = []
    with serving(other, app.Limits(), token="<b>&") as port:
        page = browser.new_page()
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        page.goto(f"http://127.0.0.1:{port}/")
        page.get_by_role("alert").filter(has_text="the token is absent or wrong").wait_for()
        page.goto(f"http://127.0.0.1:{port}/#token=%3Cb%3E%26")
        page.reload()
        upload(page, path)
        assert nasty in page.locator("#list button").first.inner_text()
        assert nasty in page.locator("#classes").inner_text()
        assert page.locator("img").count() == 0
        page.set_input_files("#file", tmp_path / f"{nasty}.txt")
        page.get_by_role("alert").filter(has_text=nasty).wait_for()
        # Neither does a script that gets into the page all the same.
        page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=\"data:,\" onerror=alert(1)>')")
        page.wait_for_timeout(200)
        page.close()
    assert dialogs == []


def test_a_report_with_names_of_strangers_runs_no_script(browser, tmp_path):
    write_scenes(tmp_path, "val", 3)
    nasty = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    path = tmp_path / "val.json"
    content = json.loads(path.read_text())
    for category in content["categories"]:
        category["name"] = f"{nasty}{category['id']}"
    for image in content["images"]:
        stranger = f"<img src=x onerror=alert(3)>{image['file_name']}"
        (tmp_path / "images" / image["file_name"]).rename(tmp_path / "images" / stranger)
        image["file_name"] = stranger
    path.write_text(json.dumps(content))
    annotations = read_coco(path, tmp_path / "images")
    evaluation = Evaluation.of(annotations, [{**found, "score": 0.9} for found in annotations.to_coco()["annotations"]])
    (tmp_path / "out").mkdir()
    write_report(tmp_path / "out", DetectionConfig(), evaluation, evaluation.metrics(), nasty)
    dialogs = []
    page = browser.new_page()
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto((tmp_path / "out/report.html").as_uri())
    assert nasty in page.inner_text("body")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=\"data:,\" onerror=alert(1)>')")
    page.wait_for_timeout(200)
    page.close()
    assert dialogs == []


def drop(page, path, count):
    """Drops a picture `count` times, beside the place that is meant for it."""
    page.evaluate(
        """([bytes, count]) => {
            const data = new DataTransfer();
            for (let i = 1; i <= count; i++)
                data.items.add(new File([new Uint8Array(bytes)], `photo${i}.jpg`, {type: "image/jpeg"}));
            document.querySelector("h1").dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true}));
        }""",
        [list(path.read_bytes()), count],
    )


def test_files_that_are_left_out_are_said(page, picture, tmp_path):
    slide(page, 0)
    drop(page, picture, 3)
    page.get_by_text("; only photo1.jpg was taken of 3 files").wait_for()
    assert page.inner_text("#message").startswith("found ")
    (tmp_path / "notes.txt").write_text("hello")
    drop(page, tmp_path / "notes.txt", 2)
    page.get_by_role("alert").filter(has_text="; only photo1.jpg was taken of 2 files").wait_for()


@pytest.mark.parametrize(("status", "reason"), [(502, "the server refused it (502)"), (200, "another server answers")])
def test_answers_of_proxies_are_no_riddle(page, picture, status, reason):
    page.get_by_text("images of up to").wait_for()
    page.route("**/detect?*", lambda route: route.fulfill(status=status, body="<html>gateway</html>"))
    page.set_input_files("#file", picture)
    page.get_by_role("alert").filter(has_text=f"photo.jpg: {reason}").wait_for()
    page.route("**/model", lambda route: route.fulfill(status=status, body="<html>gateway</html>"))
    page.reload()
    page.get_by_role("alert").filter(has_text=reason).wait_for()


def test_the_picture_follows_the_height_of_the_window(page, picture):
    page.set_viewport_size({"width": 1000, "height": 500})
    upload(page, picture)
    page.set_viewport_size({"width": 1000, "height": 800})
    # The page's own rules forbid the code that `wait_for_function` would evaluate in it.
    playwright.expect(page.locator("#canvas")).to_have_css("height", re.compile("^6(3[89]|4[012])"))


def test_a_picture_may_be_dropped_anywhere_on_a_phone_too(page, picture):
    page.set_viewport_size({"width": 360, "height": 740})
    slide(page, 0)
    drop(page, picture, 1)
    page.locator("#list button").first.wait_for()
    assert "taken" not in page.inner_text("#message")
    # nothing is wider than the screen
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
