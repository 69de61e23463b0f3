"""Take the screenshots of the web page: python docs/images/screenshots.py, with Chromium and the extra test."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "python_tests" / "support")]
import served  # noqa: E402 (its folder is found only now)

SIGN = json.loads((ROOT / "examples" / "questions.json").read_text())[0]


def shoot(page: Page, url: str, name: str, compare: bool) -> None:
    """Ask the question of the first example, and save what the page shows."""
    page.goto(url)
    page.set_input_files("#file", ROOT / "examples" / SIGN["file"])
    page.fill("#question", SIGN["question"])
    page.set_checked("#compare", compare)
    for _ in range(2):  # the second time the image is known, and the time that is shown that of an answer
        page.click("#send")
        page.locator("#send", has_text="Ask").wait_for()
        page.wait_for_selector("#with-hr time:not(:empty)")
    page.mouse.move(0, 0)
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    shot.save(ROOT / "docs" / "images" / name, quality=82, optimize=True)


def main() -> None:
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    with served.in_this_process() as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        desktop = browser.new_page(viewport={"width": 1280, "height": 800})
        shoot(desktop, server.url, "serve.jpg", compare=True)
        phone = browser.new_page(
            viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, color_scheme="dark"
        )
        shoot(phone, server.url, "serve-phone.jpg", compare=False)
        browser.close()


if __name__ == "__main__":
    main()
