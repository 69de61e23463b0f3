"""The web page in a real browser."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import served
from PIL import Image
from playwright.sync_api import Browser, Page
from served import NAME, ROOT, data_url, message

from flexattn_cuda.serve.rows import Rows

pytestmark = [pytest.mark.slow, pytest.mark.browser]
EXAMPLES = ROOT / "examples"
SIGNS = json.loads((EXAMPLES / "questions.json").read_text())
SIGN = SIGNS[0]
OUTLINE = (0, 230, 255)


@pytest.fixture
def page(browser, signs) -> Iterator[Page]:
    yield from opened(browser, signs.url)


@pytest.fixture
def phone(browser, signs) -> Iterator[Page]:
    yield from opened(
        browser,
        signs.url,
        viewport={"width": 390, "height": 844},
        device_scale_factor=2,
        has_touch=True,
        is_mobile=True,
    )


def opened(browser: Browser, url: str, **options) -> Iterator[Page]:
    """Open a page; an error of its scripts, or a request to anywhere else, fails the test."""
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | options))
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith((url, "blob:", "data:")) else wrong.append(request.url),
    )
    page.goto(url)
    page.locator("#model").filter(has_not_text="connecting").wait_for(state="attached")
    yield page
    context.close()
    assert not wrong


def ask(page: Page, sign: dict = SIGN, compare: bool = False) -> None:
    """Upload an image, ask its question, and wait for the answers."""
    page.set_input_files("#file", EXAMPLES / sign["file"])
    page.fill("#question", sign["question"])
    page.set_checked("#compare", compare)
    page.click("#send")
    page.wait_for_selector("#with-hr time:not(:empty)")
    if compare:
        page.wait_for_selector("#without-hr time:not(:empty)")


def answer(page: Page, card: str = "#with-hr") -> str:
    return page.inner_text(f"{card} .answer").removesuffix("end").strip()


def drawn(page: Page) -> np.ndarray:
    """Return the pixels of the canvas, [H, W, 3]."""
    url = page.evaluate("document.getElementById('view').toDataURL('image/png')")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


def place(page: Page) -> tuple[float, float, float]:
    """Return the scale of the image and where it begins on the canvas, in device pixels."""
    return tuple(page.evaluate("[flexattn.viewer.scale, flexattn.viewer.left, flexattn.viewer.top]"))


@pytest.fixture
def steps(monkeypatch) -> Iterator[threading.Semaphore]:
    """Let the model take a step for each release."""
    step, allowed = Rows.__call__, threading.Semaphore(0)

    def when_allowed(*arguments):
        allowed.acquire(timeout=60)
        return step(*arguments)

    monkeypatch.setattr(Rows, "__call__", when_allowed)
    yield allowed
    allowed.release(1000)


def outlined(pixels: np.ndarray) -> np.ndarray:
    return np.abs(pixels.astype(int) - OUTLINE).max(axis=2) < 40


# ------------------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("number", range(4))
def test_the_answer_comes_with_the_regions_that_it_was_read_from(page, number):
    sign = SIGNS[number]
    ask(page, sign)
    assert answer(page) == sign["answer"]
    scale, left, top = place(page)
    rows, columns = np.nonzero(outlined(drawn(page)))
    x, y = (columns - left) / scale, (rows - top) / scale
    cell = Image.open(EXAMPLES / sign["file"]).width / 12  # one of the low-resolution map
    near = (
        (x > sign["box"][0] - cell)
        & (x < sign["box"][2] + cell)
        & (y > sign["box"][1] - cell)
        & (y < sign["box"][3] + cell)
    )
    assert near.sum() > 100, "the sign is outlined"
    assert near.mean() > 0.45, "and little else"


def test_what_is_drawn_is_what_the_model_selected(page, signs):
    ask(page)
    page.uncheck("#show-attention")
    asked = message(SIGN["question"], data_url(EXAMPLES / SIGN["file"]))
    completion = signs.client().chat.completions.create(
        model=NAME, messages=[asked], extra_body={"flexattn": {"trace": True}}
    )
    [sent] = completion.flexattn["tokens"][1]["layers"]["1"]
    grid = sent["selected"]
    bits = np.frombuffer(base64.b64decode(grid["data"]), np.uint8)
    selected = np.unpackbits(bits)[: grid["rows"] * grid["columns"]].reshape(grid["rows"], grid["columns"])
    frame, (scale, left, top) = completion.flexattn["images"][0]["frame"], place(page)
    pixels, image = drawn(page).astype(float), np.asarray(Image.open(EXAMPLES / SIGN["file"]).convert("RGB"), float)
    right = []
    for row, column in np.ndindex(selected.shape):
        x = frame[0] + (column + 0.5) * frame[2] / grid["columns"]
        y = frame[1] + (row + 0.5) * frame[3] / grid["rows"]
        if not (10 < x < image.shape[1] - 10 and 10 < y < image.shape[0] - 10):
            continue
        shown = pixels[round(top + y * scale) - 5 :, round(left + x * scale) - 5 :][:11, :11]
        given = image[round(y) - 6 : round(y) + 7, round(x) - 6 : round(x) + 7]
        right.append((shown.mean() > 0.8 * given.mean()) == selected[row, column])  # what is not selected is dimmed
    assert len(right) > 900 and np.mean(right) > 0.995 and 0 < selected.mean() < 0.1


def test_the_answer_appears_token_by_token(page, steps):
    page.set_input_files("#file", EXAMPLES / SIGN["file"])
    page.fill("#question", SIGN["question"])
    page.press("#question", "Enter")
    steps.release()
    page.wait_for_selector("#with-hr .answer button")
    assert answer(page) == "8" and page.inner_text("#send") == "Stop"
    assert page.inner_text("#token-name") == "1 of 1: “8”" and outlined(drawn(page)).sum() > 100
    steps.release()
    page.wait_for_selector("#with-hr .answer button:nth-child(2)")
    assert answer(page) == "89" and page.inner_text("#with-hr time") == ""
    steps.release()
    page.wait_for_selector("#with-hr time:not(:empty)")
    assert page.inner_text("#send") == "Ask"


def test_an_answer_can_be_stopped(page, steps):
    page.set_input_files("#file", EXAMPLES / SIGN["file"])
    page.fill("#question", SIGN["question"])
    page.click("#send")
    steps.release()
    page.wait_for_selector("#with-hr .answer button")
    page.click("#send")
    page.locator("#send", has_text="Ask").wait_for()
    assert answer(page) == "8" and page.is_hidden("#problem")


def test_the_low_resolution_model_is_compared(page, signs):
    ask(page, compare=True)
    asked = message(SIGN["question"], data_url(EXAMPLES / SIGN["file"]))
    low = signs.client().chat.completions.create(model=NAME, messages=[asked], extra_body={"flexattn": {"hr": False}})
    assert answer(page) == SIGN["answer"] != answer(page, "#without-hr") == low.choices[0].message.content
    full = drawn(page)
    for what in ("attention", "regions"):
        page.uncheck(f"#show-{what}")
    plain = drawn(page)
    page.check("#show-lowres")
    low_view = drawn(page)
    assert detail(low_view) < 0.6 * detail(plain) and not np.array_equal(full, plain)


def detail(pixels: np.ndarray) -> float:
    """Return how often neighbours differ."""
    return float((np.abs(np.diff(pixels.astype(int), axis=1)).max(axis=2) > 4).mean())


# -------------------------------------------------------------------------------------------------- tokens and layers


def test_the_sliders_step_through_tokens_and_layers(page):
    ask(page)
    seen = {}
    for token in range(3):
        page.fill("#token", str(token))
        assert page.inner_text("#token-name").startswith(f"{token + 1} of 3: {['“8”', '“9”', 'the end'][token]}")
        assert page.get_attribute(f"#with-hr .answer button:nth-child({token + 1})", "aria-pressed") == "true"
        for layer in range(3):
            page.fill("#layer", str(layer))
            assert page.inner_text("#layer-name") == str(layer + 1)
            seen[token, layer] = drawn(page).tobytes()
    assert len({seen[0, layer] for layer in range(3)}) == 3 and len({seen[token, 0] for token in range(3)}) >= 2
    assert "is the last" in page.inner_text("#meaning")
    page.click("#with-hr .answer button:nth-child(1)")
    page.fill("#layer", "0")
    assert drawn(page).tobytes() == seen[0, 0] and "layer 2 reads at high resolution" in page.inner_text("#meaning")


# -------------------------------------------------------------------------------------------------------- zoom and pan


def test_one_to_one_shows_the_pixels_of_the_image(page, tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "noise.png")
    page.set_input_files("#file", tmp_path / "noise.png")
    page.wait_for_selector("#zoom:visible")
    page.click("#zoom-full")
    assert page.inner_text("#scale") == "100 %"
    page.evaluate(
        "v => { flexattn.viewer.left = v[0]; flexattn.viewer.top = v[1]; flexattn.viewer.draw(); }", [-700, -400]
    )
    pixels = drawn(page)
    height, width = pixels.shape[:2]
    assert np.abs(pixels.astype(int) - values[400 : 400 + height, 700 : 700 + width]).max() <= 1


def test_the_wheel_zooms_where_the_pointer_is_and_dragging_moves(page):
    ask(page)
    box = page.locator("#view").bounding_box()
    x, y = box["x"] + 600, box["y"] + 100
    scale, left, top = place(page)
    under = ((x - box["x"] - left) / scale, (y - box["y"] - top) / scale)
    page.mouse.move(x, y)
    page.mouse.wheel(0, -600)
    zoomed, left, top = place(page)
    assert zoomed > 2 * scale
    assert ((x - box["x"] - left) / zoomed, (y - box["y"] - top) / zoomed) == pytest.approx(under, abs=0.01)
    page.mouse.down()
    page.mouse.move(x + 40, y + 25, steps=4)
    page.mouse.up()
    assert place(page) == pytest.approx((zoomed, left + 40, top + 25))
    page.click("#zoom-fit")
    assert place(page)[0] == pytest.approx(scale)
    page.focus("#view")
    page.keyboard.press("+")
    page.keyboard.press("ArrowLeft")
    assert place(page)[0] == pytest.approx(1.25 * scale)


def test_a_dropped_image_is_shown(page):
    content = list((EXAMPLES / SIGN["file"]).read_bytes())
    page.evaluate(
        """content => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(content)], "sign.jpg", { type: "image/jpeg" }));
            const drop = new DragEvent("drop", { dataTransfer: transfer, bubbles: true });
            document.getElementById("drop").dispatchEvent(drop);
        }""",
        content,
    )
    page.wait_for_selector("#zoom:visible")
    assert page.is_hidden("#drop") and drawn(page).std() > 30


# --------------------------------------------------------------------------------------------------------------- phone


def test_everything_fits_a_phone(phone):
    ask(phone, SIGNS[1], compare=True)
    assert answer(phone) == SIGNS[1]["answer"]
    width, view = phone.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert width <= view == 390
    for name in ("#send", "#zoom-in", "#zoom-fit", "#token", "#layer", "#compare-line"):
        phone.locator(name).scroll_into_view_if_needed()
        box = phone.locator(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["height"] >= 28
        assert phone.locator("#view").bounding_box()["y"] == 0, "the image stays in sight"
    assert outlined(drawn(phone)).sum() > 200


def test_two_fingers_zoom(phone):
    ask(phone)
    before = place(phone)[0]
    session = phone.context.new_cdp_session(phone)

    def touch(kind: str, *points: tuple[int, int]) -> None:
        touches = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(points)]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})

    touch("touchStart", (180, 200), (210, 200))
    for spread in (30, 60, 90):
        touch("touchMove", (180 - spread, 200), (210 + spread, 200))
    touch("touchEnd")
    assert place(phone)[0] > 3 * before


# -------------------------------------------------------------------------------------------------------------- errors


def test_what_goes_wrong_is_said_in_a_sentence(page, tmp_path):
    (tmp_path / "no.png").write_bytes(b"no image")
    page.set_input_files("#file", tmp_path / "no.png")
    page.wait_for_selector("#problem:visible")
    assert "not an image" in page.inner_text("#problem")
    page.set_input_files("#file", EXAMPLES / SIGN["file"])
    page.wait_for_selector("#zoom:visible")
    page.click("#send")
    assert page.inner_text("#problem") == "Ask a question."
    page.fill("#question", "What does </s> say?")
    page.click("#send")
    page.wait_for_selector("#problem:visible")
    assert "special token" in page.inner_text("#problem") and page.inner_text("#send") == "Ask"


@pytest.mark.parametrize("by_address", [False, True])
def test_a_token_lets_the_page_in(browser, by_address):
    with served.in_this_process(token="sesame opens") as server:
        url = f"{server.url}#token=sesame%20opens" if by_address else server.url
        for page in opened(browser, server.url) if not by_address else opened_at(browser, url):
            if not by_address:
                assert page.is_visible("#token-form")
                page.fill("#secret", "sesame opens")
                page.press("#secret", "Enter")
                page.wait_for_selector("#token-form", state="hidden")
            ask(page)
            assert answer(page) == SIGN["answer"] and "token" not in page.url


def opened_at(browser: Browser, url: str) -> Iterator[Page]:
    context = browser.new_context()
    page = context.new_page()
    page.goto(url)
    page.locator("#model").filter(has_not_text="connecting").wait_for(state="attached")
    yield page
    context.close()


def test_a_server_that_ended_is_told(browser):
    with served.Process() as process:
        for page in opened(browser, process.served.url):
            ask(page)
            process.process.kill()
            process.process.wait()
            page.click("#send")
            page.wait_for_selector("#problem:visible")
            assert "cannot be reached" in page.inner_text("#problem")
