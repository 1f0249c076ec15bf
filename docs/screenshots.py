"""The pictures of the README: MLflow's own pages over the runs in a folder, seen by a headless browser.

    python docs/screenshots.py FOLDER RUN    # FOLDER holds an mlflow.db, RUN is the name of one of its runs

Needs Debian's packages chromium and chromium-driver, and `pip install selenium`. Writes docs/images/*.png.
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


def browser() -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "window-size=1700,1000"):
        options.add_argument(f"--{flag}")
    return webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))


def main(folder: Path, name: str) -> None:
    client = MlflowClient(f"sqlite:///{folder.resolve() / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("convoy").experiment_id
    runs = [run for run in client.search_runs([experiment]) if run.info.run_name == name]
    run_page = f"/#/experiments/{experiment}/runs/{runs[0].info.run_id}"
    pages = {
        "runs": f"/#/experiments/{experiment}/runs?workflowType=machine_learning&compareRunsMode=CHART",
        "figure": f"{run_page}/artifacts/figures/learning_curves.png?workflowType=machine_learning",
    }
    images = ROOT / "docs" / "images"
    images.mkdir(exist_ok=True)
    with mlflow_server(folder) as url:
        driver = browser()
        try:
            for name, page in pages.items():
                driver.get("about:blank")
                driver.get(url + page)
                time.sleep(8)  # charts load one by one, and nothing says when the last is there
                for close in driver.find_elements("css selector", "[aria-label='Close']"):
                    close.click()
                time.sleep(2)
                driver.save_screenshot(str(images / f"{name}.png"))
        finally:
            driver.quit()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
