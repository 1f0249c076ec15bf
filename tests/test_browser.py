"""What a person sees: MLflow's pages over real runs, and the report, in a real browser.

With CONVOY_SCREENSHOTS=FOLDER the pages are saved there as they were seen.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from selenium.webdriver import Chrome

from pipeline.__main__ import main
from pipeline.config import FIELDS
from pipeline.report.comparison import LOCAL_SERVER, find_stores, read_runs
from pipeline.run.folder import RunFolder
from tests.browser import all_of, missing_for_browser, open_browser, read_console, wait_for, with_text
from tests.mlflow_pages import (
    all_rows,
    boxes_of_runs,
    close_assistant,
    num_curves,
    plot_accuracy,
    rows_with,
    show_only_differences,
)
from tests.servers import mlflow_server, server_environment

ROOT = Path(__file__).parents[1]
RATES = {"lr-0.1": "0.1", "lr-1.0": "1.0"}


@dataclass(frozen=True)
class Site:
    """Two runs of one experiment, and the server that shows them."""

    folder: Path
    runs: list[RunFolder]
    url: str

    @property
    def experiment(self) -> str:
        return f"{self.url}/#/experiments/{self.runs[0].status()['mlflow_experiment_id']}/runs"

    def page_of(self, run: RunFolder) -> str:
        return f"{self.experiment}/{run.status()['mlflow_run_id']}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    if missing := missing_for_browser():
        pytest.skip(missing)
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def site(browser: Chrome, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two trainings at once on a new store, as a user's shell would start them, and then a bare `mlflow server`."""
    folder = tmp_path_factory.mktemp("site")
    train_at_once(folder)
    with mlflow_server(folder) as url:
        yield Site(folder, [RunFolder(folder / "runs" / name) for name in RATES], url)


def train_at_once(folder: Path) -> None:
    command = [sys.executable, str(ROOT / "train" / "main.py"), "train.epochs=6", "train.threads=1"]
    with ExitStack() as stack:
        trainings = []
        for name, rate in RATES.items():
            with (folder / f"{name}.log").open("w") as log:
                training = subprocess.Popen(
                    [*command, f"run.name={name}", f"optim.lr={rate}"],
                    cwd=folder,
                    env=server_environment(),
                    stdout=log,
                    stderr=log,
                )
            stack.callback(training.kill)  # does nothing to one that has ended
            trainings.append((training, folder / f"{name}.log"))
        for training, path in trainings:
            assert training.wait(timeout=200) == 0, path.read_text()
            assert "look at the run" in path.read_text()


def keep_screenshot(browser: Chrome, name: str) -> None:
    if folder := os.environ.get("CONVOY_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def test_two_runs_are_selected_in_the_list_and_compared(browser: Chrome, site: Site) -> None:
    browser.get(f"{site.experiment}?workflowType=machine_learning")
    wait_for(browser, lambda: len(boxes_of_runs(browser)) == len(RATES), "a list of two runs")
    close_assistant(browser)
    keep_screenshot(browser, "list")
    for box in boxes_of_runs(browser):
        box.click()
    wait_for(browser, lambda: with_text(browser, "button", "Compare"), "a button to compare them")[0].click()
    wait_for(browser, lambda: "/compare-runs" in browser.current_url, "their comparison")
    expect_comparison(browser)
    plot_accuracy(browser)
    show_only_differences(browser)
    wait_for(browser, lambda: not rows_with(browser, "train.epochs"), "only what differs")
    assert settings_shown(browser) == {"optim.lr", "run.name"}
    keep_screenshot(browser, "compare")


def expect_comparison(browser: Chrome) -> None:
    """Both names, and the setting that differs with both its values."""
    cells = wait_for(browser, lambda: rows_with(browser, "optim.lr"), "a row of optim.lr")
    assert sorted(cells[0][1:]) == sorted(RATES.values())
    (names,) = rows_with(browser, "Run Name:")
    assert sorted(names[1:]) == sorted(RATES)


def settings_shown(browser: Chrome) -> set[str]:
    """Names of rows that are names of settings."""
    return {row[0] for row in all_rows(browser) if row and row[0] in FIELDS}


def test_the_link_of_the_report_leads_to_the_same_comparison(browser: Chrome, site: Site) -> None:
    (store,) = find_stores(read_runs(run.path for run in site.runs))
    address = dict(store.pages)["settings and results side by side"]
    browser.get("about:blank")
    browser.get(address.replace(LOCAL_SERVER, site.url))
    expect_comparison(browser)


def test_their_curves_are_overlaid(browser: Chrome, site: Site) -> None:
    browser.get(f"{site.experiment}?workflowType=machine_learning&compareRunsMode=CHART")
    wait_for(browser, lambda: num_curves(browser, "eval/accuracy") == 2, "both curves of eval/accuracy in one chart")
    wait_for(browser, lambda: num_curves(browser, "eval/loss") == 2, "both curves of eval/loss in one chart")
    close_assistant(browser)
    keep_screenshot(browser, "curves")


def test_a_figure_of_a_run_is_shown(browser: Chrome, site: Site) -> None:
    run = site.runs[0]
    browser.get(f"{site.page_of(run)}?workflowType=machine_learning")
    wait_for(browser, lambda: with_text(browser, "h1, h2, h3", run.name), "the page of the run")
    close_assistant(browser)
    keep_screenshot(browser, "run")
    browser.get(f"{site.page_of(run)}/artifacts/figures/learning_curves.png?workflowType=machine_learning")
    selector = "img[alt='figures/learning_curves.png'], img.rc-image-img"
    image = wait_for(browser, lambda: all_of(browser, selector), "the figure")[0]
    wait_for(browser, lambda: image.get_property("complete"), "the figure to be loaded")
    assert int(str(image.get_property("naturalWidth"))) > 600
    keep_screenshot(browser, "figure")


def test_the_report_works_from_a_file_without_a_word_on_the_console(browser: Chrome, site: Site) -> None:
    page = site.folder / "report.html"
    assert main(["report", *(str(run.path) for run in site.runs), "--out", str(page)]) == 0
    read_console(browser)  # forgets what was said before
    browser.get(page.as_uri())
    keep_screenshot(browser, "report")
    (setting,) = rows_with(browser, "run")[1:2]
    assert setting == ["run", "optim.lr"]
    assert len(all_of(browser, ".charts img")) == 4
    for summary in all_of(browser, "summary"):
        summary.click()
    images = all_of(browser, ".charts img, .pictures img")
    assert len(images) >= 4 + 2 * 4
    wait_for(browser, lambda: all(int(str(image.get_property("naturalWidth"))) > 0 for image in images), "all figures")
    keep_screenshot(browser, "report-open")
    assert read_console(browser) == []
