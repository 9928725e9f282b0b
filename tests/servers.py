"""Real database servers for the tests, started where their binaries are installed."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
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


@contextlib.contextmanager
def postgres(password: str = "secret") -> Iterator[str]:
    """Start a PostgreSQL server on a free port, and yield the URL of an empty database."""
    pytest.importorskip("psycopg", reason="the extra `postgresql` is not installed")
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
        settings = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        control = str(binaries / "pg_ctl")
        run(control, "-D", str(data), "-l", str(log), "-o", settings, "-w", "start")
        try:
            yield f"postgresql://study:{password}@127.0.0.1:{port}/postgres"
        finally:
            run(control, "-D", str(data), "-m", "immediate", "-w", "stop")
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
        )
        try:
            url = f"redis://:{password}@127.0.0.1:{port}/0"
            deadline = time.monotonic() + 20
            while True:
                try:
                    client.Redis.from_url(url).ping()
                    break
                except client.ConnectionError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)
            yield url
        finally:
            server.kill()
            server.wait()
