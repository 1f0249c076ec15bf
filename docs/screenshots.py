"""The pictures of MLflow's pages in the README: three learning rates, seen by a headless browser.

    python docs/screenshots.py

Needs Debian's packages chromium and chromium-driver, and `pip install selenium`. Trains three short runs on the digits
in a temporary folder and writes runs.png, compare.png and run.png to docs/images. docs/images/learning_curves.png is
runs/<name>/figures/learning_curves.png of the recipe fashion_mnist.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from selenium.webdriver import Chrome

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.report.comparison import LOCAL_SERVER, find_stores, read_runs  # noqa: E402
from pipeline.run.folder import RunFolder  # noqa: E402
from tests.browser import all_of, open_browser, wait_for  # noqa: E402
from tests.mlflow_pages import (  # noqa: E402
    close_assistant,
    num_curves,
    plot_accuracy,
    rows_with,
    show_only_differences,
)
from tests.servers import mlflow_server, server_environment  # noqa: E402

IMAGES = ROOT / "docs" / "images"
RATES = ("0.1", "0.3", "1.0")
FIGURE = "figures/confusion_matrix.png"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="convoy-") as temporary:
        folder = Path(temporary)
        runs = [train(folder, rate) for rate in RATES]
        with mlflow_server(folder) as url:
            experiment = f"{url}/#/experiments/{runs[0].status()['mlflow_experiment_id']}/runs"
            with open_browser(1700, 1000) as browser:
                show_curves(browser, experiment)
                save(browser, "runs")
            with open_browser(1280, 1310) as browser:
                show_comparison(browser, comparison_of(runs).replace(LOCAL_SERVER, url))
                save(browser, "compare")
            with open_browser(1280, 1080) as browser:
                show_figure(browser, f"{experiment}/{runs[-1].status()['mlflow_run_id']}/artifacts/{FIGURE}")
                save(browser, "run")


def train(folder: Path, rate: str) -> RunFolder:
    """Return a run that is published to the store in `folder`."""
    name = f"lr-{rate}"
    settings = [f"run.name={name}", f"optim.lr={rate}", "train.epochs=8"]
    command = [sys.executable, str(ROOT / "train" / "main.py"), *settings]
    subprocess.run(command, cwd=folder, env=server_environment(), check=True)
    return RunFolder(folder / "runs" / name)


def show_curves(browser: Chrome, experiment: str) -> None:
    browser.get(f"{experiment}?workflowType=machine_learning&compareRunsMode=CHART")
    for metric in ("eval/accuracy", "eval/loss"):
        wait_for(browser, lambda: num_curves(browser, metric) == len(RATES), f"the curves of {metric}")  # noqa: B023


def comparison_of(runs: list[RunFolder]) -> str:
    """Return the address that the report links to."""
    (store,) = find_stores(read_runs(run.path for run in runs))
    return dict(store.pages)["settings and results side by side"]


def show_comparison(browser: Chrome, address: str) -> None:
    browser.get(address)
    wait_for(browser, lambda: rows_with(browser, "optim.lr"), "their comparison")
    close_assistant(browser)
    plot_accuracy(browser)
    show_only_differences(browser)
    wait_for(browser, lambda: not rows_with(browser, "train.epochs"), "only what differs")
    browser.execute_script("document.activeElement.blur()")  # no frame around what was used last


def show_figure(browser: Chrome, address: str) -> None:
    browser.get(f"{address}?workflowType=machine_learning")
    selector = f"img[alt='{FIGURE}'], img.rc-image-img"
    image = wait_for(browser, lambda: all_of(browser, selector), "the figure")[0]
    wait_for(browser, lambda: int(str(image.get_property("naturalWidth"))) > 0, "the figure to be loaded")


def save(browser: Chrome, name: str) -> None:
    """Save a picture of the page once it has come to rest: two that follow one another are the same."""
    close_assistant(browser)
    last = b""

    def rests() -> bool:
        nonlocal last
        before, last = last, browser.get_screenshot_as_png()
        return last == before

    wait_for(browser, rests, f"the page of {name}.png to come to rest")
    (IMAGES / f"{name}.png").write_bytes(last)


if __name__ == "__main__":
    main()
