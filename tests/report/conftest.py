"""A real browser, of which every complaint is an error."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]

Open = Callable[..., Any]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Headless Chromium; the test is skipped where there is none."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Open]:
    """Opens a file in a fresh profile; at the end, nothing may have been reported, asked for or popped up."""
    complaints: list[str] = []
    requests: list[str] = []
    files: list[str] = []
    with ExitStack() as stack:

        def open_file(file: Path, width: int = 1280, scheme: str = "light") -> Any:
            context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            stack.callback(context.close)
            page = context.new_page()
            page.on("console", lambda message: complaints.append(f"console: {message.text}"))
            page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
            page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
            # Data URIs stand in the file itself.
            page.on("request", lambda request: request.url.startswith("data:") or requests.append(request.url))
            files.append(file.resolve().as_uri())
            page.goto(files[-1])
            return page

        yield open_file
        assert complaints == []
        assert requests == files
