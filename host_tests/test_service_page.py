"""The page of the service in a real Chromium: every button, with the answers of a real service."""

import asyncio
import csv
import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("av", reason="the service needs pynq_kgrc[serve]")
pytest.importorskip("fastapi", reason="the service needs pynq_kgrc[serve]")

from serving import LABELS, Serving, write_program, write_video

from pynq_kgrc.results import Label, WindowLabels
from pynq_kgrc.service.examples import EXAMPLES, example_files
from pynq_kgrc.service.jobs import Admission, Jobs
from pynq_kgrc.service.schemas import Progress

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PAGE = Path(__file__).resolve().parent.parent / "pynq_kgrc" / "service" / "page"
KEY = "0123456789abcdef"


# ---- what the page asks the service for -----------------------------------------------------


def test_the_page_is_small_and_asks_no_other_place():
    files = list(PAGE.iterdir())
    assert sum(path.stat().st_size for path in files) < 100_000
    for path in files:
        if path.suffix in (".html", ".css", ".js"):
            links = re.findall(r"https?://[^\s\"'`<]+", path.read_text("utf-8"))
            assert set(links) <= {"http://www.w3.org/2000/svg", "http://127.0.0.1:8000"}, path


def test_every_button_with_a_name_is_pressed_here():
    names = re.findall(r'<(?:button|select|input) id="([\w-]+)"', (PAGE / "index.html").read_text())
    assert len(names) > 12
    here = Path(__file__).read_text("utf-8")
    assert [name for name in names if f'"#{name}"' not in here] == []


def test_the_examples_are_the_clips_that_ship(example_clips):
    shipped = {}
    for place in ("", "depth/"):
        with (example_clips / place / "index.csv").open(newline="", encoding="utf-8") as file:
            shipped |= {place + row["file"]: row["label"] for row in csv.DictReader(file)}
    assert {example.name: example.label for example in EXAMPLES} == shipped
    assert {e.picture for e in EXAMPLES} <= {path.name for path in PAGE.iterdir()}
    assert list(example_files()) == [example.name for example in EXAMPLES]


def test_a_job_tells_its_place_in_the_queue_and_the_clips_so_far(tmp_path):
    rows = [WindowLabels(i, i + 1, (Label("run", 1.0),)) for i in range(3)]

    async def tell():
        jobs = Jobs(tmp_path / "jobs.sqlite", Admission(9, "videos"), 1, 60, 60)
        told, go = [], asyncio.Event()

        async def work(report):
            report(Progress(len(rows), 9, None), rows)
            await go.wait()
            raise RuntimeError("the end")

        made = [jobs.submit("", None, work, lambda: None) for _ in range(4)]
        for job in made:
            jobs.keep(job)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for job in made:
            document, _ = jobs.find(job.id, since=1)
            told.append((document.state, document.ahead, document.windows))
        seen = []
        async for document in jobs.events(made[0].id, None, 0.01):
            if document is None:
                go.set()
            else:
                seen += document.windows
        assert jobs.find(made[0].id)[0].state == "failed"
        for job in made:
            job.task.cancel()
        await asyncio.gather(*[job.task for job in made], return_exceptions=True)
        jobs.close()
        return told, seen

    told, seen = asyncio.run(tell())
    assert told[0] == ("running", 0, tuple(rows[1:]))
    assert told[1:] == [("queued", n, ()) for n in range(3)]
    assert seen == rows


# ---- the page -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def service(folder):
    program = write_program(folder / "tiny.kgrc", labels=("arm wrestling", *LABELS[1:]))
    (folder / "tiny.txt").write_text("Knows four\nthings.")
    clip = dataclasses.replace(program.clip, threshold=0.999)
    msgspec.structs.replace(program, labels=LABELS, clip=clip).save(folder / "strict.kgrc")
    arguments = ["--program", folder / "tiny.kgrc"]  # the first is the one that is chosen
    with Serving(*arguments, state=folder / "state", program=folder / "strict.kgrc") as serving:
        yield serving
    assert not [record for record in serving.records if record["level"] == "error"]


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: the page was not tested (apt install chromium)")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="pip install pynq_kgrc[clients]: the page was not tested"
    )
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # fmt: skip
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """An empty page with a simulated webcam; no error may be logged, no other host be asked."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(60_000)
    complaints, strangers = [], []
    opened.on("console", lambda m: m.type == "error" and complaints.append(m.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda r: "//127.0.0.1" not in r.url and strangers.append(r.url))
    yield opened
    context.close()
    # Chromium also reports the requests that a test has refused on purpose
    assert [text for text in complaints if not re.search("status of (401|404|429|503)", text)] == []
    assert [url for url in strangers if not url.startswith(("blob:", "data:"))] == []


def visit(page, service):
    page.goto(f"http://127.0.0.1:{service.port}/")
    page.locator(".example").first.wait_for()


def classified(page, count=1):
    """Wait until the displayed video has all its results."""
    page.locator("#times-columns > div").nth(count - 1).wait_for()
    page.locator("#status", has_text=re.compile("^Classified")).wait_for()


def result_of(page):
    with page.expect_download() as waiting:
        page.get_by_role("button", name="JSON").first.click()
    return json.loads(Path(waiting.value.path()).read_text("utf-8"))


def text_of(page, name):
    with page.expect_download() as waiting:
        page.get_by_role("button", name=name).first.click()
    assert waiting.value.suggested_filename == f"arm_wrestling_k400.tiny.{name.lower()}"
    return Path(waiting.value.path()).read_bytes().decode()


def labels(page):
    return page.locator("#columns .bar b").all_inner_texts()


def shoot(page, name):
    """Take a screenshot if KGRC_SCREENSHOTS names a folder."""
    if "KGRC_SCREENSHOTS" in os.environ:
        page.screenshot(path=f"{os.environ['KGRC_SCREENSHOTS']}/{name}.png", full_page=True)


def test_a_visitor_clicks_an_example(service, page):
    visit(page, service)
    assert "Which action is this?" in page.title()
    assert "bit-exact emulation" in page.inner_text("header")
    assert page.inner_text("#about") == "Knows four things."
    assert page.locator("#always-sure").is_visible()  # the program has no threshold
    page.select_option("#program", "strict")
    assert page.locator("#always-sure").is_hidden()
    page.select_option("#program", "tiny")
    page.click("#knows-title")
    page.fill("#search", "WRES")
    assert page.locator("#actions li").all_inner_texts() == ["arm wrestling"]
    known = page.locator(".example").all_inner_texts()
    assert "not among" in known[0] and "not among" not in known[1]
    page.locator(".example").nth(1).click()
    classified(page)
    answer = result_of(page)
    assert len(answer["windows"]) == 35
    assert page.locator(".segments button").all_inner_texts() == [
        s["label"] for s in answer["segments"]
    ]
    shown = [each for each in answer["labels"] if each["confidence"] >= 0.005]
    assert labels(page) == [each["label"] for each in shown]
    assert "modelled" in page.inner_text("#times")
    page.locator(".thumbs canvas").nth(7).wait_for()
    assert page.locator(".curve polyline").count() == 3

    page.locator(".segments button").first.focus()  # the keyboard: to the last action
    page.keyboard.press("End")
    last = answer["segments"][-1]
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith(
        f"{last['label']}, {last['start_ms'] / 1000:.1f} s"
    )
    page.locator("#bars-title", has_text=f"at {last['start_ms'] / 1000:.1f} s").wait_for()
    box = page.locator(".track").bounding_box()  # the mouse: to the middle
    page.mouse.click(box["x"] + 0.5 * box["width"], box["y"] + 10)
    page.locator("#bars-title", has_text="at 5.0 s").wait_for()
    assert page.evaluate("player.currentTime") == pytest.approx(5, abs=0.2)
    now = [w for w in answer["windows"] if w["start_ms"] <= 5010][-1]["labels"]
    assert labels(page)[0] == now[0]["label"]
    assert page.locator(".segments .now").count() == 1
    page.click("#whole")
    assert page.inner_text("#bars-title") == "Best labels over the whole video"
    assert labels(page) == [each["label"] for each in shown]
    page.click("#moment")
    assert page.inner_text("#bars-title") == "Best labels at 5.0 s"

    rows = text_of(page, "CSV").split("\r\n")
    assert rows[0].startswith("start_s,end_s,label_1,confidence_1") and len(rows) == 37
    first = answer["windows"][0]
    assert rows[1].startswith(f"0,{first['end_ms'] / 1000:g},{first['labels'][0]['label']},")
    lines = text_of(page, "SRT").split("\n")
    assert lines[1].startswith("00:00:00,000 --> 00:00:")
    assert lines[2].startswith(answer["segments"][0]["label"])
    page.get_by_role("button", name="Copy as curl").click()
    command = page.locator("#columns textarea").input_value()
    assert f"127.0.0.1:{service.port}/v1/videos:classify?top_k=5&program=tiny'" in command
    assert "--data-binary '@arm_wrestling_k400.mp4'" in command
    shoot(page, "result")


LATE_EVENTS = """
const listen = HTMLVideoElement.prototype.addEventListener;
const held = [];
const holds = (name) => name === document.body.dataset.hold;
const tell = () => {
  for (const act of held.splice(0)) act();
  document.body.dataset.held = "";
};
HTMLVideoElement.prototype.addEventListener = function (name, act, options) {
  const later = (event) => {
    if (this.id || !holds(name)) return act.call(this, event);
    held.push(() => act.call(this, event));
    document.body.dataset.held = name;
  };
  listen.call(this, name, later, options);
};
addEventListener("tell", tell);
new MutationObserver(() => {  // the third picture is late
  const drawn = document.querySelectorAll(".thumbs canvas").length;
  if (drawn === 2) document.body.dataset.hold = "seeked";
}).observe(document, { childList: true, subtree: true });
"""  # events of the video of the pictures, which has no id, come when the test says so


def test_a_slow_browser_gets_the_pictures_of_the_timeline_later(service, page):
    page.add_init_script(LATE_EVENTS)
    page.clock.install()
    visit(page, service)
    page.evaluate("document.body.dataset.hold = 'loadeddata'")
    page.locator(".example").nth(1).click()
    classified(page)
    page.locator("body[data-held=loadeddata]").wait_for()
    page.clock.fast_forward(40_000)
    page.get_by_role("button", name="Copy as curl").click()
    page.evaluate("document.body.dataset.hold = ''; dispatchEvent(new Event('tell'))")
    page.locator("body[data-held=seeked]").wait_for()
    assert page.locator(".thumbs canvas").count() == 2
    page.evaluate("document.body.dataset.hold = 'no more'")
    page.clock.fast_forward(100_000)  # the third is given up
    page.locator(".thumbs canvas").nth(6).wait_for()
    columns = (
        "[...document.querySelectorAll('.thumbs canvas')].map((c) => +c.style.gridColumnStart)"
    )
    assert page.evaluate(columns) == [1, 2, 4, 5, 6, 7, 8]
    assert page.locator("#columns textarea").count() == 1  # only pictures were drawn
    page.locator("#videos button").click()  # a second look
    page.locator(".thumbs canvas").nth(7).wait_for()
    assert page.evaluate(columns) == [*range(1, 9)]
    page.evaluate("show(videos[0]); seek(5000)")  # before the video is loaded
    assert page.evaluate("player.currentTime") == pytest.approx(5, abs=0.2)


def test_other_settings_make_a_result_old_and_results_survive_a_reload(service, page, folder):
    write_video(folder / "short.mp4", frames=40)
    visit(page, service)
    page.set_input_files("#file", str(folder / "short.mp4"))
    classified(page)
    assert page.locator("#stale").is_hidden()
    page.click("#options summary")
    page.select_option("#sampling", "windows")
    page.fill("#stride", "4")
    page.locator("#stride").blur()
    page.select_option("#compare", "strict")
    assert "result of tiny" in page.inner_text("#stale")
    page.click("#look")
    classified(page, 2)
    assert page.locator("#stale").is_hidden()
    assert page.locator("#columns h3").all_inner_texts() == ["tiny", "strict"]
    assert page.locator("#columns > div").nth(1).locator(".unsure").count() == 1
    assert page.locator("#columns > div").nth(0).locator(".unsure").count() == 0
    assert page.locator("#videos button").count() == 2
    answer = result_of(page)
    assert len(answer["windows"]) == 9
    shown = labels(page)

    page.evaluate("localStorage.clear()")  # as another browser that is given the address
    page.reload()
    classified(page, 2)
    assert labels(page) == shown
    assert "not kept" in page.inner_text("#no-preview")
    page.evaluate("history.replaceState(null, '', '/')")
    page.reload()  # this browser keeps results
    page.locator("#videos button").click()
    assert labels(page) == shown
    page.click("#another")
    assert page.locator("#drop").is_visible() and page.locator("#results").is_hidden()
    page.click("#forget")
    assert page.locator("#history").is_hidden()
    assert page.evaluate("localStorage.getItem('kgrc.results')") == "[]"


def test_several_files_an_error_before_the_player_and_cancel(service, page, folder):
    video = write_video(folder / "several.mp4", frames=24)
    visit(page, service)
    good = {"name": "good.mp4", "mimeType": "video/mp4", "buffer": video}
    with page.expect_file_chooser() as chooser:
        page.click("#drop")
    chooser.value.set_files([{**good, "name": "bad.mp4", "buffer": b"no video"}, good])
    page.locator("#error", has_text="not a video").wait_for()
    page.locator("#videos button", has_text=re.compile(r"good.mp4: .* %")).click()
    classified(page)
    assert page.locator("#error").is_hidden()
    page.locator("#videos button", has_text="bad.mp4: failed").click()
    assert "not a video" in page.inner_text("#error")
    assert page.locator("#player").is_hidden() and page.locator("#results").is_hidden()
    assert page.locator("#no-preview").is_hidden()

    page.route("**/v1/jobs/*?since=*", lambda route: route.fulfill(json={
        "id": "x", "state": "queued", "ahead": 3, "windows": [],
        "progress": {"windows": 0, "frames": 0, "share": None}}))  # fmt: skip
    page.set_input_files("#file", [good])
    page.locator("#status", has_text="In the queue, 3 before it").wait_for()
    page.click("#cancel")
    page.locator("#status", has_text="Cancelled.").wait_for()


def test_a_slow_or_busy_service_costs_no_video(service, page, folder):
    write_video(folder / "early.mp4", frames=24)
    held, busy = [], [503]
    page.route("**/v1/programs", lambda route: held.append(route))

    def job(route):
        route.fulfill(status=busy.pop(), json={"error": "busy"}) if busy else route.continue_()

    page.route("**/v1/jobs/*?since=*", job)
    page.goto(f"http://127.0.0.1:{service.port}/")
    page.set_input_files("#file", str(folder / "early.mp4"))  # before the programs are known
    page.locator("#drop").focus()
    assert page.locator("#videos button").count() == 0
    service.until(lambda: held or page.wait_for_timeout(20), 30)
    held.pop().continue_()
    classified(page)
    assert not busy and page.locator("#videos button").count() == 1


def test_a_webcam_that_is_stopped_before_it_is_granted_stays_off(service, page):
    page.add_init_script("""navigator.mediaDevices.getUserMedia = () => new Promise((done) => {
      const canvas = document.createElement("canvas");
      window.stream = canvas.captureStream();
      window.grant = () => done(window.stream);
    });""")
    visit(page, service)
    page.click("#webcam")
    page.click("#webcam")
    page.evaluate("grant()")
    page.locator("#webcam", has_text="Use the webcam").wait_for()
    assert page.evaluate("stream.getTracks().map((track) => track.readyState)") == ["ended"]
    assert page.locator("#drop").is_visible() and page.locator("#player").is_hidden()


def test_without_a_webcam_the_page_says_what_helps(service, chromium):
    context = chromium.new_context()
    context.add_init_script("Object.defineProperty(navigator, 'mediaDevices', {value: undefined})")
    page = context.new_page()
    visit(page, service)
    assert page.locator("#webcam").is_hidden()
    assert f"ssh -L 8000:127.0.0.1:{service.port}" in page.inner_text("#no-webcam")
    context.close()


@pytest.mark.slow
def test_the_page_uses_the_webcam(service, page):
    visit(page, service)
    page.click("#webcam")
    page.locator("#bars-title", has_text="Now, says tiny").wait_for()
    page.select_option("#program", "strict")  # the live session changes too
    page.locator("#bars-title", has_text="Now, says strict").wait_for()
    assert page.locator("#columns .unsure").count() == 1
    shoot(page, "webcam")
    page.click("#webcam")
    assert page.locator("#drop").is_visible()
    service.until(lambda: service.log.count("/v1/live") >= 2, 10)


@pytest.mark.slow
def test_who_knows_nothing_gets_a_right_label_with_one_click(page, folder, monkeypatch):
    """Of a plain `pynq-kgrc serve`, with the program that ships."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))  # without I3D, which would be first
    with Serving(state=folder / "plain") as plain:
        visit(page, plain)
        assert "depth camera" in page.inner_text("#about")
        shoot(page, "plain")
        page.locator(".example").first.click()
        classified(page)
        assert labels(page)[0] == "right arm swipe to the left"
        assert page.locator(".unsure").count() == 0
        page.click("#another")
        page.locator(".example").nth(1).click()
        page.locator(".unsure", has_text="not an action that utd_mhad27 knows").wait_for()


@pytest.mark.slow
def test_the_page_asks_for_a_key_and_keeps_it_for_the_tab(service, page, folder):
    (folder / "keys").write_text(KEY)
    arguments = ["--api-key-file", folder / "keys"]
    with Serving(*arguments, state=folder / "keyed", program=folder / "tiny.kgrc") as keyed:
        page.goto(f"http://127.0.0.1:{keyed.port}/")
        page.locator("#error", has_text="asks for a key").wait_for()
        page.click("#key-open")
        assert page.locator("#key-box").is_hidden()
        page.click("#key-open")
        page.fill("#key", "wrong")
        page.click("#key-use")
        page.locator("#error", has_text="does not know that key").wait_for()
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.locator(".example").first.click()
        classified(page)
        page.get_by_role("button", name="Copy as curl").click()
        assert KEY not in page.locator("#columns textarea").input_value()
        page.reload()
        classified(page)
        assert KEY not in page.evaluate("JSON.stringify(localStorage) + location.href")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_axe_finds_nothing(service, chromium, scheme, width):
    """The rules of axe-core, contrast among them; and nothing is wider than the screen."""
    module = pytest.importorskip(
        "axe_playwright_python.sync_playwright",
        reason="pip install .[clients]: contrast and names were not checked",
    )
    context = chromium.new_context(
        viewport={"width": width, "height": 844}, color_scheme=scheme, device_scale_factor=1
    )
    page = context.new_page()

    def check():
        assert module.Axe().run(page).response["violations"] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width

    visit(page, service)
    page.click("#knows-title")
    page.click("#key-open")
    check()
    shoot(page, f"start-{scheme}-{width}")
    page.select_option("#compare", "strict")
    page.locator(".example").nth(1).click()
    classified(page, 2)
    page.locator("#times summary").first.click()
    page.locator(".segments button").first.click()
    check()
    shoot(page, f"result-{scheme}-{width}")
    bad = {"name": "x.mp4", "mimeType": "video/mp4", "buffer": b"no video"}
    page.set_input_files("#file", bad)
    page.locator("#error", has_text="not a video").wait_for()
    check()
    context.close()


@pytest.mark.slow
def test_the_api_page_lists_every_route(service, page):
    page.goto(f"http://127.0.0.1:{service.port}/docs")
    page.wait_for_selector("#paths summary")
    listed = " ".join(page.locator("#paths summary").all_inner_texts())
    for path in service.get("/openapi.json").json["paths"]:
        assert path in listed
    shoot(page, "docs")
