"""train/main.py with the fault that CONVOY_FAULT describes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.faults.inject import Fault, inject
from train import agreement
from train.main import main

if __name__ == "__main__":
    agreement.VOTE_EVERY = 0.05  # the trainings are short
    described = json.loads(os.environ["CONVOY_FAULT"])
    if described is not None and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        inject(Fault(**described | {"ranks": tuple(described["ranks"])}), int(os.environ.get("RANK", "0")))
    sys.exit(main())
