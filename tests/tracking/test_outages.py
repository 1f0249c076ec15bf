"""Servers that die, hang, fail and crawl while a training records at every step: afterwards they have all of it, once.

All scenarios run at once, since they mostly wait; each test looks at what one of them has left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.servers import Fault, FaultyProxy, MlflowServer, PostgresServer, missing_for_postgres
from tests.tracking.history import differences, find_runs, recorded_history, stored_history
from tests.tracking.recorder import NOT_ALL_PUBLISHED
from tests.tracking.recording import BEGINS, ENDS, PATIENCE, Recording, sync

pytestmark = pytest.mark.faults

AFTER_DEATH = 30.0
"""Seconds that a publisher may go on after the end of its training."""


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
    assert recording.wait_until_unpublished() < AFTER_DEATH + 5
    proxy.set_fault("none")
    sync_all(recording)
    sync_all(recording)
    return exit_code


def slowness_for_good(recording: Recording, proxy: FaultyProxy, fault: Fault) -> int:
    """Each reply takes seconds, but comes: `sync` has to get there all the same."""
    recording.wait_for(lambda: "train/loss" in recorded_history(recording.run))
    exit_code = recording.finish()
    assert recording.wait_until_unpublished() < AFTER_DEATH + 5
    sync_all(recording)
    return exit_code


def sync_all(recording: Recording) -> None:
    synced = sync(recording.run)
    assert synced.returncode == 0, synced.stdout + synced.stderr


def killed_thrice(recording: Recording, server: MlflowServer) -> int:
    """By SIGKILL, and started on the same port and store, while all goes on."""
    for _ in range(3):
        recording.wait_until_caught_up()
        server.kill()
        server.start()
    recording.wait_until_caught_up()
    return recording.finish()


def failing_database(recording: Recording, postgres: PostgresServer) -> int:
    """The server lives on while its database crashes, and while that is read-only, as a nearly full one is made."""
    recording.wait_until_caught_up()
    postgres.crash()
    recording.wait_for_line(BEGINS)
    postgres.start()
    recording.wait_until_caught_up()
    postgres.set_read_only(True)
    num_lines = len(recording.log())
    recording.wait_for(lambda: len(recording.log()) > num_lines)
    postgres.set_read_only(False)
    recording.wait_until_caught_up()
    return recording.finish()


@dataclass(frozen=True)
class Faulty:
    """A recording through a proxy that is told to fail."""

    scenario: Callable[[Recording, FaultyProxy, Fault], int]
    fault: Fault
    num_outages: int = 1
    """That may be noticed."""
    from_the_start: bool = False
    published_later: bool = False
    """By `sync`, and not by the end of the training."""
    lose_reply_to: str | None = None


FAULTY = {
    "refused": Faulty(passing, "refused"),
    "silent": Faulty(passing, "silent"),
    "500": Faulty(passing, "500"),
    "slow": Faulty(passing_slowness, "slow"),
    "refused_from_the_start": Faulty(from_the_start, "refused", from_the_start=True),
    "slow_from_the_start": Faulty(slowness_from_the_start, "slow", from_the_start=True),
    "slow_for_good": Faulty(slowness_for_good, "slow", from_the_start=True, published_later=True),
    "created_without_a_reply": Faulty(lost_reply, "none", lose_reply_to="/runs/create"),
    "refused_at_the_end": Faulty(at_the_end, "refused", published_later=True),
    "silent_at_the_end": Faulty(at_the_end, "silent", published_later=True),
    "refused_from_start_to_end": Faulty(from_start_to_end, "refused", from_the_start=True, published_later=True),
}
Mortal = Callable[[Recording, MlflowServer], int]
"""A recording to a server that fails itself."""
MORTAL = {"killed_thrice": 3, "killed_thrice_on_postgresql": 3, "failing_database": 2}
"""Number of outages."""
NEED_POSTGRES = ("killed_thrice_on_postgresql", "failing_database")


class Stand:
    """Where the scenarios run, all at once but those on PostgreSQL; servers are started when they are given in."""

    def __init__(self, folder: Path, stack: ExitStack):
        self._folder = folder
        self._stack = stack
        self._executor = stack.enter_context(ThreadPoolExecutor(20))

    def start(self, name: str, *arguments: str) -> Future[MlflowServer]:
        folder = self._folder / name
        folder.mkdir()
        server = MlflowServer(folder, *arguments)
        self._stack.callback(server.kill)

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
            postgres = PostgresServer()
            stack.callback(postgres.close)
            postgres.start()
            on_postgres = stand.start("postgresql", "--backend-store-uri", postgres.uri)
            scenarios = (killed_thrice, lambda recording, _: failing_database(recording, postgres))
            named = zip(NEED_POSTGRES, scenarios, strict=True)
            results |= zip(NEED_POSTGRES, stand.run_mortal(*named, server=on_postgres), strict=True)
        (results["killed_thrice"],) = stand.run_mortal(("killed_thrice", killed_thrice), server=stand.start("mortal"))
        steady = stand.start("steady")
        results |= {name: stand.run_faulty(name, steady) for name in FAULTY}
        yield results


@pytest.mark.parametrize("name", [*FAULTY, *MORTAL])
def test_the_server_has_what_was_recorded_point_for_point_and_once(
    outcomes: dict[str, Future[Outcome]], name: str, tmp_path: Path
) -> None:
    if name in NEED_POSTGRES and (missing := missing_for_postgres()):
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
    num_outages = faulty.num_outages if faulty else MORTAL[name]
    assert recording.num_lines(BEGINS) <= num_outages
    assert recording.num_lines(ENDS) <= num_outages
    assert len(recording.log()) <= 2 * num_outages, "\n".join(recording.log())
