"""The picture of the README: MLflow's page over the runs in a folder, seen by a headless browser.

    python docs/screenshots.py FOLDER    # FOLDER holds the mlflow.db of the recipes' runs

Needs Debian's packages chromium and chromium-driver, and `pip install selenium`. Writes docs/images/runs.png.
docs/images/learning_curves.png is runs/<name>/figures/learning_curves.png of the recipe fashion_mnist.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from mlflow import MlflowClient
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.servers import mlflow_server  # noqa: E402


def open_browser() -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "window-size=1700,1000"):
        options.add_argument(f"--{flag}")
    return webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))


def main(folder: Path) -> None:
    client = MlflowClient(f"sqlite:///{folder.resolve() / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("convoy").experiment_id
    target = ROOT / "docs" / "images" / "runs.png"
    target.parent.mkdir(exist_ok=True)
    with mlflow_server(folder) as url:
        browser = open_browser()
        try:
            browser.get(f"{url}/#/experiments/{experiment}/runs?workflowType=machine_learning&compareRunsMode=CHART")
            time.sleep(8)  # charts load one by one, and nothing says when the last is there
            for close in browser.find_elements("css selector", "[aria-label='Close']"):
                close.click()
            time.sleep(2)
            browser.save_screenshot(str(target))
        finally:
            browser.quit()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
