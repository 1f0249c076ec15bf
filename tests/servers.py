"""Real servers on loopback, gone afterwards: `mlflow server`, PostgreSQL, and a proxy that fails as it is told."""

from __future__ import annotations

import http.client
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

START_SECONDS = 120.0
SLOW_SECONDS = 5.0
"""Before each reply of a slow server."""


def free_port() -> int:
    """That somebody else may take before it is used."""
    with reserved_port() as port:
        return port


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port at which nobody listens, unless a server is started there: it is kept from all others meanwhile."""
    with reserve_port() as reservation:
        yield port_of(reservation)


def reserve_port() -> socket.socket:
    """A socket that refuses connections and keeps its port from others, but for a server that binds it to listen."""
    reservation = socket.socket()
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reservation.bind(("127.0.0.1", 0))
    return reservation


def port_of(reservation: socket.socket) -> int:
    port: int = reservation.getsockname()[1]
    return port


class MlflowServer:
    """`mlflow server` started in `folder`, where its log is. Started again, it has the same port and the same store.

    It keeps the port until `close`.
    """

    def __init__(self, folder: Path, *arguments: str):
        self.folder = folder
        self._reservation = reserve_port()
        self.port = port_of(self._reservation)
        self.url = f"http://127.0.0.1:{self.port}"
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once it answers."""
        module = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        with (self.folder / "mlflow-server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*module, *self._arguments],
                cwd=self.folder,
                env=server_environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            ended = self._process.poll()
            assert ended is None, f"ended with {ended}:\n{(self.folder / 'mlflow-server.log').read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"{self.url} does not answer"
            time.sleep(0.1)

    def kill(self) -> None:
        """All its processes at once, by SIGKILL."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def close(self) -> None:
        self.kill()
        self._reservation.close()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def server_environment() -> dict[str, str]:
    """Under pytest MLflow checks itself and fails where it would not elsewhere; a server must not know of it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PYTEST_"))}
    return kept | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


@contextmanager
def mlflow_server(folder: Path, *arguments: str) -> Iterator[str]:
    """`mlflow server` started in `folder`; yields its address once it answers."""
    server = MlflowServer(folder, *arguments)
    try:
        server.start()
        yield server.url
    finally:
        server.close()


class PostgresServer:
    """A PostgreSQL of its own, reached by a socket in a folder of its own, with fsync off."""

    def __init__(self) -> None:
        programs = postgres_programs()
        assert programs is not None, missing_for_postgres()
        self._programs = programs
        # its own user must be able to enter it, and the path of a socket may have 107 characters at most
        self._folder = Path(tempfile.mkdtemp(prefix="convoy-postgres-"))
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:  # which PostgreSQL refuses
            self._user = {"user": "postgres", "group": "postgres", "extra_groups": []}
            shutil.chown(self._folder, "postgres", "postgres")
        self.uri = f"postgresql+psycopg2://convoy@/postgres?host={self._folder}"
        """With everything MLflow needs to connect."""
        self._process: subprocess.Popen[bytes] | None = None
        self._run("initdb", "--pgdata=data", "--username=convoy", "--auth=trust", "--encoding=UTF8", "--no-sync")

    def start(self) -> None:
        """Returns once it answers; after a crash it first recovers."""
        self._process = subprocess.Popen(
            [self._programs / "postgres", "-D", "data", "-k", self._folder, "-h", "", "-F"],  # no TCP, no fsync
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            **self._user,
        )
        deadline = time.monotonic() + START_SECONDS
        while self._run("pg_isready", f"--host={self._folder}", check=False) != 0:
            assert self._process.poll() is None and time.monotonic() < deadline, "PostgreSQL does not answer"
            time.sleep(0.1)

    def crash(self) -> None:
        """End it at once and without a checkpoint (PostgreSQL's immediate shutdown): it recovers at the next start."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
            self._process = None

    def execute(self, statement: str) -> None:
        self._run("psql", f"--host={self._folder}", "--username=convoy", "--command", statement, "postgres")

    def set_read_only(self, is_so: bool) -> None:
        """For all transactions that begin from now on."""
        self.execute(f"ALTER SYSTEM SET default_transaction_read_only = {'on' if is_so else 'off'}")
        self.execute("SELECT pg_reload_conf()")

    def close(self) -> None:
        self.crash()
        shutil.rmtree(self._folder)

    def _run(self, program: str, *arguments: str, check: bool = True) -> int:
        command = [str(self._programs / program), *arguments]
        done = subprocess.run(command, cwd=self._folder, capture_output=True, text=True, check=False, **self._user)
        assert not check or done.returncode == 0, f"{program}: {done.stderr}"
        return done.returncode


def postgres_programs() -> Path | None:
    """Where Debian keeps those of its newest PostgreSQL."""
    versions = Path("/usr/lib/postgresql").glob("*/bin/postgres")
    return max((path.parent for path in versions), key=lambda path: float(path.parent.name), default=None)


def missing_for_postgres() -> str | None:
    """Why there can be no server with PostgreSQL here, and what to install."""
    if postgres_programs() is None:
        return "PostgreSQL is not installed: apt-get install postgresql"
    if importlib.util.find_spec("psycopg2") is None:
        return "psycopg2 is not installed: pip install psycopg2-binary"
    return None


Fault = Literal["none", "refused", "silent", "500", "slow"]


class FaultyProxy:
    """HTTP on a port of its own, handed on to a real server, with a fault that can be changed while it runs.

    refused: nobody listens on the port, and connections there are are cut. silent: requests are taken and never
    answered. 500: they are answered so, and not handed on. slow: they are handed on at once and answered
    SLOW_SECONDS later.

    Whatever the fault, one reply to a path that ends with `lose_reply_to` is lost: the server did what it was asked.
    """

    def __init__(self, upstream: MlflowServer, fault: Fault = "none", lose_reply_to: str | None = None):
        self.upstream = upstream
        self.lose_reply_to = lose_reply_to
        self._reservation = reserve_port()
        self.port = port_of(self._reservation)
        self.url = f"http://127.0.0.1:{self.port}"
        self.fault: Fault = "refused"
        self.fault_is_over = threading.Event()
        self.connections: set[socket.socket] = set()
        self._listener: ThreadingHTTPServer | None = None
        self.set_fault(fault)

    def set_fault(self, fault: Fault) -> None:
        self.fault = fault
        self.fault_is_over.set()
        self.fault_is_over = threading.Event()
        if fault == "refused":
            self._stop_listening()
        elif self._listener is None:
            self._listener = _Listener(self)
            threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True).start()

    def is_to_lose(self, path: str) -> bool:
        """Whether the reply that is due now is the one to be lost."""
        if self.lose_reply_to is None or not path.endswith(self.lose_reply_to):
            return False
        self.lose_reply_to = None
        return True

    def close(self) -> None:
        self.set_fault("refused")
        self._reservation.close()

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.shutdown()
            self._listener.server_close()
            self._listener = None
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, proxy: FaultyProxy):
        super().__init__(("127.0.0.1", proxy.port), _Handler)
        self.proxy = proxy


class _Handler(BaseHTTPRequestHandler):
    """One connection; a request is treated by the fault there is when it has arrived."""

    protocol_version = "HTTP/1.1"
    server: _Listener

    def setup(self) -> None:
        super().setup()
        self.server.proxy.connections.add(self.connection)

    def finish(self) -> None:
        self.server.proxy.connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # the client has gone, or the connection was cut
            self.close_connection = True

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault, is_over = self.server.proxy.fault, self.server.proxy.fault_is_over
        if fault == "silent":
            is_over.wait()
        if fault in ("silent", "refused"):
            self.close_connection = True
        elif fault == "500":
            self._answer(500, {}, b"told to fail")
        else:
            answer = self._ask_upstream(body)
            if self.server.proxy.is_to_lose(self.path):
                self.close_connection = True
                return
            if fault == "slow":
                time.sleep(SLOW_SECONDS)
            self._answer(*answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

    def _ask_upstream(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.proxy.upstream.port, timeout=60)
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            return answer.status, dict(answer.headers), answer.read()
        except OSError:
            return 502, {}, b"the server behind this proxy does not answer"
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nobody reads it."""
