"""MLflow's pages as a person uses them: what to press, and what is seen."""

from __future__ import annotations

from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.browser import all_of, wait_for, with_text


def boxes_of_runs(browser: Chrome) -> list[WebElement]:
    """Of the list of runs, to select them."""
    return all_of(browser, ".ag-row .ag-selection-checkbox .ag-checkbox-input-wrapper")


def close_assistant(browser: Chrome) -> None:
    """It takes a third of the page. A later MLflow may not have it."""
    for button in all_of(browser, "[data-component-id='mlflow.assistant.chat_panel.close']"):
        button.click()


def plot_accuracy(browser: Chrome) -> None:
    """By what differs, instead of the metric that MLflow chose."""
    metrics = all_of(browser, ".du-bois-light-select-multiple")[1]
    metrics.find_element(By.CSS_SELECTOR, ".du-bois-light-select-selection-item-remove").click()
    metrics.find_element(By.TAG_NAME, "input").send_keys("eval/accuracy")
    options = ".du-bois-light-select-item-option"
    wait_for(browser, lambda: with_text(browser, options, "eval/accuracy"), "the metric to choose")[0].click()
    metrics.find_element(By.TAG_NAME, "input").send_keys(Keys.ESCAPE)
    plotted = ("optim.lr", "eval/accuracy")
    wait_for(browser, lambda: all(name in plot_of(browser).text for name in plotted), "a plot of both")


def plot_of(browser: Chrome) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, ".js-plotly-plot")


def rows_with(browser: Chrome, first: str) -> list[list[str]]:
    """Rows of tables by their first cell, as texts."""
    return [row for row in all_rows(browser) if row and row[0] == first]


def all_rows(browser: Chrome) -> list[list[str]]:
    script = "return [...document.querySelectorAll('tr')].map((r) => [...r.cells].map((c) => c.innerText.trim()))"
    rows: list[list[str]] = browser.execute_script(script)
    return rows


def num_curves(browser: Chrome, metric: str) -> int:
    """Different ones: each is drawn twice, and MLflow's choice of colours may give two runs the same."""
    cards = browser.find_elements(By.CSS_SELECTOR, "[data-testid='experiment-view-compare-runs-card']")
    chart = next(card for card in cards if card.text.startswith(metric))
    paths = chart.find_elements(By.CSS_SELECTOR, ".js-plotly-plot .scatterlayer path.js-line")
    return len({shape for path in paths if (shape := path.get_attribute("d"))})


def show_only_differences(browser: Chrome) -> None:
    """In all tables of a comparison."""
    for switch in browser.find_elements(By.CSS_SELECTOR, "[aria-label$='Show diff only']"):
        browser.execute_script("arguments[0].click()", switch)
