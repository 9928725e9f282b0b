"""Real database servers for the tests, started where their binaries are installed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

POSTGRES_FOLDERS = "/usr/lib/postgresql/*/bin", "/usr/local/pgsql/bin"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def postgres_binaries() -> Path:
    """Return the folder of initdb and pg_ctl, or skip the test."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).parent
    for pattern in POSTGRES_FOLDERS:
        for folder in sorted(Path("/").glob(pattern.lstrip("/")), reverse=True):
            if (folder / "initdb").exists():
                return folder
    pytest.skip("PostgreSQL's server binaries are not installed")


def unprivileged() -> dict[str, object]:
    """Return what makes a child run as another user where the tests run as root.

    PostgreSQL refuses to be run by root.
    """
    if os.getuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    pytest.skip("PostgreSQL refuses to be run by root, and there is no other user")


def end_with_parent(end: signal.Signals) -> None:
    """Ask Linux to end this child when the tests are killed, which no `finally` survives."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, int(end))  # PR_SET_PDEATHSIG


def wait_until_up(connect: Callable[[], object], refused: type[Exception]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            connect()
            return
        except refused:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@contextlib.contextmanager
def postgres(password: str = "secret") -> Iterator[str]:
    """Start a PostgreSQL server on a free port, and yield the URL of an empty database."""
    client = pytest.importorskip("psycopg", reason="the extra `postgresql` is not installed")
    binaries, child = postgres_binaries(), unprivileged()
    # Not pytest's temporary folder: its parents are closed to other users.
    folder = Path(tempfile.mkdtemp(prefix="has-postgres-"))
    folder.chmod(0o755)
    try:
        data, words, log = folder / "data", folder / "password", folder / "log"
        data.mkdir()
        words.write_text(password)
        for path in (data, words, folder):
            if child:
                os.chown(path, child["user"], child["group"])
        port = free_port()

        def run(*command: str) -> None:
            subprocess.run(
                command,
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                timeout=60,
                **child,
            )

        run(
            str(binaries / "initdb"),
            *("-D", str(data), "-U", "study", "-A", "scram-sha-256", "-E", "UTF8"),
            *("--pwfile", str(words), "--no-sync"),
        )
        with log.open("wb") as output:
            server = subprocess.Popen(
                [
                    *(str(binaries / "postgres"), "-D", str(data), "-p", str(port)),
                    *("-k", str(folder), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"),
                ],
                stdout=output,
                stderr=output,
                cwd=folder,
                preexec_fn=partial(end_with_parent, signal.SIGQUIT),
                **child,
            )
        try:
            url = f"postgresql://study:{password}@127.0.0.1:{port}/postgres"
            wait_until_up(lambda: client.connect(url).close(), client.OperationalError)
            yield url
        finally:
            server.send_signal(signal.SIGQUIT)
            server.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def redis(password: str = "secret") -> Iterator[str]:
    """Start a Redis server on a free port, and yield its URL."""
    client = pytest.importorskip("redis", reason="the extra `redis` is not installed")
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="has-redis-") as folder:
        server = subprocess.Popen(
            [
                binary,
                *("--port", str(port), "--bind", "127.0.0.1", "--requirepass", password),
                *("--save", "", "--dir", folder),
            ],
            stdout=subprocess.DEVNULL,
            preexec_fn=partial(end_with_parent, signal.SIGKILL),
        )
        try:
            url = f"redis://:{password}@127.0.0.1:{port}/0"
            wait_until_up(client.Redis.from_url(url).ping, client.ConnectionError)
            yield url
        finally:
            server.kill()
            server.wait()
