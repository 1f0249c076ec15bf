"""Servers that die, hang, fail and crawl while a training records at every step: afterwards they have all of it, once.

All scenarios run at once, since they mostly wait; each test looks at what one of them has left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.servers import Fault, FaultyProxy, MlflowServer, PostgresServer, missing_for_postgres
from tests.tracking.history import differences, find_runs, recorded_history, stored_history
from tests.tracking.recorder import NOT_ALL_PUBLISHED
from tests.tracking.recording import BEGINS, ENDS, PATIENCE, Recording, sync

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

GONE_AFTER = 45.0
"""Seconds after the end of its training when a publisher has to be gone.

It gives up after 30 s, or is ended after 32.5 s while it waits for a reply; on busy cores, with its lower priority, its
last words take their time, and so does looking for it.
"""


@dataclass(frozen=True)
class Outcome:
    recording: Recording
    exit_code: int
    """Of the recording process."""


def passing(recording: Recording, proxy: FaultyProxy, fault: Fault) -> int:
    """It works, fails until that is noticed, and works again."""
    recording.wait_until_caught_up()
    proxy.set_fault(fault)
    recording.wait_for_line(BEGINS)
    return recover(recording, proxy)


def passing_slowness(recording: Recording, proxy: FaultyProxy, fault: Fault) -> int:
    """Which need not be noticed: three replies that come late."""
    recording.wait_until_caught_up()
    proxy.set_fault(fault)
    time.sleep(15)
    return recover(recording, proxy)


def from_the_start(recording: Recording, proxy: FaultyProxy, fault: Fault) -> int:
    """As `passing`, but the run is still to be created."""
    recording.wait_for_line(BEGINS)
    return recover(recording, proxy)


def slowness_from_the_start(recording: Recording, proxy: FaultyProxy, fault: Fault) -> int:
    time.sleep(15)
    return recover(recording, proxy)


def lost_reply(recording: Recording, proxy: FaultyProxy, fault: Fault) -> int:
    """The run is created, but nobody is told."""
    recording.wait_until_caught_up()
    assert proxy.lose_reply_to is None
    return recording.finish()


def recover(recording: Recording, proxy: FaultyProxy) -> int:
    proxy.set_fault("none")
    recording.wait_until_caught_up()
    return recording.finish()


def at_the_end(recording: Recording, proxy: FaultyProxy, fault: Fault) -> int:
    """Until all processes have ended; then `sync` is called."""
    recording.wait_until_caught_up()
    proxy.set_fault(fault)
    return end_without_server(recording, proxy)


def from_start_to_end(recording: Recording, proxy: FaultyProxy, fault: Fault) -> int:
    """As `at_the_end`, but the server has never heard of the run."""
    recording.wait_for_line(BEGINS)
    return end_without_server(recording, proxy)


def end_without_server(recording: Recording, proxy: FaultyProxy) -> int:
    exit_code = recording.finish()
    assert recording.wait_until_unpublished() < GONE_AFTER
    proxy.set_fault("none")
    sync_all(recording)
    sync_all(recording)
    return exit_code


def slowness_for_good(recording: Recording, proxy: FaultyProxy, fault: Fault) -> int:
    """Each reply takes seconds, but comes: `sync` has to get there all the same."""
    recording.wait_for(lambda: "train/loss" in recorded_history(recording.run))
    exit_code = recording.finish()
    assert recording.wait_until_unpublished() < GONE_AFTER
    sync_all(recording)
    return exit_code


def sync_all(recording: Recording) -> None:
    synced = sync(recording.run)
    assert synced.returncode == 0, synced.stdout + synced.stderr


def killed_thrice(recording: Recording, server: MlflowServer) -> int:
    """By SIGKILL, and started on the same port and store, while all goes on."""
    for number in range(3):
        recording.wait_until_caught_up()
        server.kill()
        server.start()
        recording.wait_for_line(ENDS, number + 1)  # or the next kill would belong to the same outage
    return recording.finish()


def failing_database(recording: Recording, postgres: PostgresServer) -> int:
    """The server lives on while its database crashes, and while that is read-only, as a nearly full one is made."""
    recording.wait_until_caught_up()
    postgres.crash()
    recording.wait_for_line(BEGINS)
    postgres.start()
    recording.wait_for_line(ENDS)
    postgres.set_read_only(True)
    recording.wait_for_line(BEGINS, 2)
    postgres.set_read_only(False)
    return recording.finish()


@dataclass(frozen=True)
class Faulty:
    """A recording through a proxy that is told to fail."""

    scenario: Callable[[Recording, FaultyProxy, Fault], int]
    fault: Fault
    num_outages: range = range(1, 2)
    """How many the publisher may notice."""
    from_the_start: bool = False
    published_later: bool = False
    """By `sync`, and not by the end of the training."""
    lose_reply_to: str | None = None

    @property
    def num_unended(self) -> tuple[int, ...]:
        """Outages whose end the publisher does not see: none, where the server works again while it lives."""
        if not self.published_later:
            return (0,)
        return (0, 1) if self.fault == "slow" else (1,)


SELDOM = range(3)
"""Of slow replies one may come after the publisher's patience of 10 s, and then another, behind one that did not."""
PASSING = {
    "refused": Faulty(passing, "refused"),
    "silent": Faulty(passing, "silent"),
    "500": Faulty(passing, "500"),
    "slow": Faulty(passing_slowness, "slow", SELDOM),
}
ON_POSTGRES = "_on_postgresql"
FAULTY = {
    **PASSING,
    **{name + ON_POSTGRES: faulty for name, faulty in PASSING.items()},
    "refused_from_the_start": Faulty(from_the_start, "refused", from_the_start=True),
    "slow_from_the_start": Faulty(slowness_from_the_start, "slow", SELDOM, from_the_start=True),
    "slow_for_good": Faulty(slowness_for_good, "slow", SELDOM, from_the_start=True, published_later=True),
    "created_without_a_reply": Faulty(lost_reply, "none", lose_reply_to="/runs/create"),
    "refused_at_the_end": Faulty(at_the_end, "refused", published_later=True),
    "silent_at_the_end": Faulty(at_the_end, "silent", published_later=True),
    "refused_from_start_to_end": Faulty(from_start_to_end, "refused", from_the_start=True, published_later=True),
}
Mortal = Callable[[Recording, MlflowServer], int]
"""A recording to a server that fails itself."""
MORTAL = {"killed_thrice": 3, "killed_thrice_on_postgresql": 3, "failing_database": 2}
"""Number of outages."""
MORTAL_ON_POSTGRES = ("killed_thrice_on_postgresql", "failing_database")


class Stand:
    """Where the scenarios run, all at once but those whose server they share and kill."""

    def __init__(self, folder: Path, stack: ExitStack):
        self._folder = folder
        self._stack = stack
        self._executor = stack.enter_context(ThreadPoolExecutor(len(FAULTY) + 4))

    def start(self, name: str, *arguments: str) -> Future[MlflowServer]:
        folder = self._folder / name
        folder.mkdir()
        server = MlflowServer(folder, *arguments)
        self._stack.callback(server.close)

        def start() -> MlflowServer:
            server.start()
            return server

        return self._executor.submit(start)

    def run_faulty(self, name: str, server: Future[MlflowServer]) -> Future[Outcome]:
        return self._executor.submit(self._run_faulty, name, server)

    def _run_faulty(self, name: str, server: Future[MlflowServer]) -> Outcome:
        faulty = FAULTY[name]
        proxy = FaultyProxy(server.result(), faulty.fault if faulty.from_the_start else "none", faulty.lose_reply_to)
        timeout = 1.0 if faulty.published_later else PATIENCE
        recording = Recording(self._folder / name, proxy.url, server.result(), close_timeout=timeout)
        try:
            return Outcome(recording, faulty.scenario(recording, proxy, faulty.fault))
        finally:
            recording.close()
            proxy.close()

    def run_mortal(self, *named: tuple[str, Mortal], server: Future[MlflowServer]) -> list[Future[Outcome]]:
        """One by one."""
        worker = self._stack.enter_context(ThreadPoolExecutor(1))
        return [worker.submit(self._run_mortal, name, scenario, server) for name, scenario in named]

    def _run_mortal(self, name: str, scenario: Mortal, server: Future[MlflowServer]) -> Outcome:
        recording = Recording(self._folder / name, server.result().url, server.result(), close_timeout=PATIENCE)
        try:
            return Outcome(recording, scenario(recording, server.result()))
        finally:
            recording.close()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Outcome]]]:
    """Of all scenarios, which run meanwhile."""
    with ExitStack() as stack:
        stand = Stand(tmp_path_factory.mktemp("outages"), stack)
        results: dict[str, Future[Outcome]] = {}
        if missing_for_postgres() is None:
            mortal, steady = start_postgres(stack), start_postgres(stack)
            server = stand.start("mortal_on_postgresql", "--backend-store-uri", mortal.uri)
            scenarios = (killed_thrice, lambda recording, _: failing_database(recording, mortal))
            named = zip(MORTAL_ON_POSTGRES, scenarios, strict=True)
            results |= zip(MORTAL_ON_POSTGRES, stand.run_mortal(*named, server=server), strict=True)
            server = stand.start("steady_on_postgresql", "--backend-store-uri", steady.uri)
            results |= {name: stand.run_faulty(name, server) for name in FAULTY if name.endswith(ON_POSTGRES)}
        (results["killed_thrice"],) = stand.run_mortal(("killed_thrice", killed_thrice), server=stand.start("mortal"))
        server = stand.start("steady")
        results |= {name: stand.run_faulty(name, server) for name in FAULTY if not name.endswith(ON_POSTGRES)}
        yield results


def start_postgres(stack: ExitStack) -> PostgresServer:
    postgres = PostgresServer()
    stack.callback(postgres.close)
    postgres.start()
    return postgres


@pytest.mark.parametrize("name", [*FAULTY, *MORTAL])
def test_the_server_has_what_was_recorded_point_for_point_and_once(
    outcomes: dict[str, Future[Outcome]], name: str, tmp_path: Path
) -> None:
    if (name.endswith(ON_POSTGRES) or name in MORTAL_ON_POSTGRES) and (missing := missing_for_postgres()):
        pytest.skip(missing)
    outcome = outcomes[name].result()
    recording = outcome.recording
    faulty = FAULTY.get(name)
    assert outcome.exit_code == (NOT_ALL_PUBLISHED if faulty and faulty.published_later else 0)
    (run,) = find_runs(recording.client, recording.run)
    assert differences(recorded_history(recording.run), stored_history(recording.client, run.info.run_id)) == []
    assert run.info.status == "FINISHED"
    result = recording.client.download_artifacts(run.info.run_id, "results/result.txt", str(tmp_path))
    assert Path(result).read_text() == f"of {name}\n"
    if faulty:
        expect_outages(recording, faulty.num_outages, faulty.num_unended)
    else:
        expect_outages(recording, (MORTAL[name],), (0,))


def expect_outages(recording: Recording, expected: Sequence[int], unended: Sequence[int]) -> None:
    """The publisher said when each began and when it ended, and nothing else."""
    log = "\n".join(recording.log())
    begun, ended = recording.num_lines(BEGINS), recording.num_lines(ENDS)
    assert begun in expected, log
    assert begun - ended in unended, log
    assert len(recording.log()) == begun + ended, log
