"""A browser without a network, whose pages say nothing and ask for nothing but files."""

import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    options = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
    ]
    with playwright.sync_playwright() as session:
        yield (chromium := session.chromium.launch(executable_path=CHROMIUM, args=options))
        chromium.close()


@pytest.fixture
def reader(browser):
    """Return what opens a page; what it says on the console or asks of a network fails the test."""
    said, contexts = [], []

    def opened(path, *, scheme="light", width=1280):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True
        )
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "request",
            lambda request: request.url.startswith(("file:", "data:")) or said.append(request.url),
        )
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []
