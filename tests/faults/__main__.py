"""A campaign of faults against trainings, and a table of what was lost by them.

    python -m tests.faults                    # all of it: many hundred rounds
    python -m tests.faults --rounds 5         # so many of each kind
    python -m tests.faults --kinds kill_ranks fill_disk --seed 7

Ends with 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults import rounds
from tests.faults.rounds import Context, NoMoreFaults, Round


@dataclass(frozen=True)
class Kind:
    round: Round
    number: int
    """Of rounds, unless --rounds says otherwise."""
    fault: str
    promise: str


SAME = "the same end"
LEGEND = "The same end: weights (SHA-256), learning rates and history are those of the run that was never disturbed."
KINDS = {
    kind.round.__name__: kind
    for kind in (
        Kind(rounds.kill_ranks, 80, "kill -9 of a rank, or of all, anywhere, up to three times", SAME),
        Kind(rounds.kill_ranks_under_torchrun, 50, "the same, started by torchrun", SAME),
        Kind(
            rounds.kill_in_save,
            1000,
            "kill -9 at each file operation of the first saves",
            f"a checkpoint loads; {SAME}",
        ),
        Kind(rounds.kill_launcher, 20, "kill -9 of torchrun", f"no survivor after 30 s, state saved; {SAME}"),
        Kind(rounds.stop_by_signal, 50, "a signal in training, evaluation, save", f"no step lost, state right; {SAME}"),
        Kind(rounds.resume_within_an_epoch, 20, "stopped thrice in an epoch, ranks 4, 2, 1, 3", SAME),
        Kind(rounds.damage_checkpoint, 200, "a checkpoint cut off, or a bit flipped", "named, the one before used"),
        Kind(rounds.fill_disk, 20, "a disk that is full for five steps", "training goes on; same weights and history"),
        Kind(rounds.damage_dataset, 20, "a dataset file cut off or changed", "refused before step 0"),
        Kind(rounds.compute_nan, 20, "NaN on one rank", "every rank skips the step"),
        Kind(rounds.raise_on_one_rank, 20, "one rank raises", "all gone in 30 s, cause named"),
        Kind(rounds.exit_on_one_rank, 20, "one rank exits", "all gone in 30 s, cause named"),
        Kind(rounds.sleep_on_one_rank, 20, "one rank sleeps for ever", "all gone within the limit, culprit named"),
        Kind(rounds.load_malicious, 25, "code in a checkpoint, of 5 kinds", "refused, nothing executed"),
    )
}


@dataclass(frozen=True)
class Tally:
    kind: Kind
    number: int
    problems: list[str]
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="of each kind; default: as many as it has")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="convoy-faults-") as folder:
        context = Context(Path(folder))
        tallies = [run_kind(KINDS[name], arguments.rounds, arguments.seed, context) for name in arguments.kinds]
    print("\n" + format_table(tallies))
    return 1 if any(tally.problems for tally in tallies) else 0


def run_kind(kind: Kind, number: int | None, seed: int, context: Context) -> Tally:
    problems: list[str] = []
    began, number = time.monotonic(), number or kind.number
    for index in range(number):
        name = f"{kind.round.__name__} {seed}/{index}"
        folder = context.folder / "round"
        folder.mkdir()
        try:
            found = kind.round(context, folder, random.Random(name))
        except NoMoreFaults:
            number = index
            break
        except Exception as error:
            found = [f"the round itself fails: {type(error).__name__}: {error}"]
        finally:
            shutil.rmtree(folder)
        problems += found
        for problem in found:
            print(f"{name}: {problem}", flush=True)
    print(f"{kind.round.__name__}: {number} rounds, {len(problems)} problems", flush=True)
    return Tally(kind, number, problems, time.monotonic() - began)


def format_table(tallies: Sequence[Tally]) -> str:
    lines = ["| fault | rounds | nothing lost means | lost | seconds |", "| --- | ---: | --- | ---: | ---: |"]
    for tally in tallies:
        kind = tally.kind
        lines.append(
            f"| {kind.fault} | {tally.number} | {kind.promise} | {len(tally.problems)} | {tally.seconds:,.0f} |"
        )
    return "\n".join([*lines, "", LEGEND])


if __name__ == "__main__":
    sys.exit(main())
