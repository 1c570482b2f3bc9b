"""A browser, a server that answers from a script, and the page of one in the other."""

import shutil

import pytest

from tests.serving.page.page_server import SECONDS, PageServer

try:
    from playwright.sync_api import expect, sync_playwright
except ImportError:
    sync_playwright = None

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]
FLAGS += ["--disable-component-update", "--disable-sync"]
KEY = "sk-of-the-test"


@pytest.fixture(scope="module")
def browser():
    if sync_playwright is None:
        pytest.skip("playwright is not installed: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium found: install the system's package chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def server():
    with PageServer() as server:
        yield server


@pytest.fixture
def base_url(server):
    return server.url


@pytest.fixture
def open_page(browser, base_url):
    """Opens the page in a fresh browser context; in the end no script has failed, nobody else was asked."""
    contexts, asked, failures = [], [], []

    def open_it(**settings):
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(SECONDS * 1000 / 2)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on(
            "console", lambda message: failures.append(message.text) if "Policy" in message.text else None
        )
        page.goto(base_url)
        expect(page.locator("#model")).not_to_have_text("…")
        enter_key(page)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert not failures
    assert not [url for url in asked if not url.startswith((base_url, "data:"))]


def enter_key(page):
    panel = page.get_by_role("button", name="Cost and settings")
    if panel.is_visible():
        panel.click()
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Escape")
    page.locator("#question").focus()


@pytest.fixture
def page(open_page):
    return open_page()
