"""A real browser without a window, which reaches nothing but this machine, and is gone afterwards."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

Found = TypeVar("Found")
PATIENCE = 40.0
"""Seconds that a page may take, where others work too."""
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # which root cannot have
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
    # with a mouse, as a person has it: without one, MLflow covers its charts with the buttons that show on hovering
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


def missing_for_browser() -> str | None:
    """What has to be installed; None if all is there."""
    programs = {"chromium": "chromium", "chromedriver": "chromium-driver"}
    missing = [package for program, package in programs.items() if shutil.which(program) is None]
    return f"no browser: apt-get install {' '.join(missing)}" if missing else None


@contextmanager
def open_browser(width: int = 1400, height: int = 1280) -> Iterator[webdriver.Chrome]:
    """Chromium with a profile of its own. What its console says is kept (`get_log("browser")`)."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--window-size={width},{height}"):
        options.add_argument(flag)
    with tempfile.TemporaryDirectory(prefix="convoy-browser-", ignore_cleanup_errors=True) as profile:
        options.add_argument(f"--user-data-dir={Path(profile)}")
        browser = webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
        try:
            yield browser
        finally:
            browser.quit()


def read_console(browser: webdriver.Chrome) -> list[str]:
    """What the console said since the last reading, whatever its level."""
    entries = browser.get_log("browser")  # type: ignore[no-untyped-call]
    return [f"{entry['level']}: {entry['message']}" for entry in entries]


def wait_for(browser: webdriver.Chrome, find: Callable[[], Found], what: str) -> Found:
    """What `find` returns once that is something; React may replace an element while it is looked at."""
    return WebDriverWait(browser, PATIENCE, 0.2, ignored_exceptions=[StopIteration, WebDriverException]).until(
        lambda _: find(), what
    )


def all_of(browser: webdriver.Chrome, selector: str) -> list[WebElement]:
    return [element for element in browser.find_elements(By.CSS_SELECTOR, selector) if element.is_displayed()]


def with_text(browser: webdriver.Chrome, selector: str, text: str) -> list[WebElement]:
    return [element for element in all_of(browser, selector) if element.text.strip() == text]
