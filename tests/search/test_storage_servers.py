"""What goes wrong with a database server is one clear error, without its password."""

from __future__ import annotations

import optuna
import pytest

from hf_adaptive_sparse.search.errors import SearchError, StorageError
from hf_adaptive_sparse.search.opening import open_study
from hf_adaptive_sparse.search.storage import open_storage, storage_errors
from tests import servers

MADE_FOR = {"model": "A", "space": {"blocks": 4}}


def open_on(url, made_for=MADE_FOR):
    with storage_errors(url):
        return open_study(
            open_storage(url), "s", made_for=made_for, baseline={"x": 0.5}, attributes={}
        )


@pytest.fixture(params=["postgresql", "redis"])
def server(request):
    with getattr(servers, {"postgresql": "postgres"}.get(request.param, request.param))() as url:
        yield url


def test_a_study_on_a_server_is_found_again(server):
    made = open_on(server)
    assert [t.user_attrs for t in open_on(server).trials] == [t.user_attrs for t in made.trials]
    with pytest.raises(SearchError, match=r"space\.blocks \(4, now 8\)"):
        open_on(server, MADE_FOR | {"space": {"blocks": 8}})


def test_wrong_credentials_are_named_as_such_and_not_repeated(server):
    with pytest.raises(StorageError, match=r"(?i)password|credentials|authent") as caught:
        open_on(server.replace("secret", "wr0ng"))
    assert "wr0ng" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value)


@pytest.mark.parametrize("scheme", ["postgresql", "redis"])
def test_an_unreachable_server_is_one_clear_error(scheme):
    pytest.importorskip({"postgresql": "psycopg"}.get(scheme, scheme))
    url = f"{scheme}://user:secret@127.0.0.1:{servers.free_port()}/0"
    with pytest.raises(StorageError, match=r"cannot be used: .*refused") as caught:
        open_on(url)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "installed"),
    [
        ("postgresql://127.0.0.1/x", r"'hf-adaptive-sparse\[postgresql\]'"),
        ("mysql://127.0.0.1/x", "the driver that SQLAlchemy wants for it"),
    ],
)
def test_a_missing_driver_says_what_installs_it(monkeypatch, url, installed):
    def missing(*_, **__):
        raise ModuleNotFoundError("No driver.")

    monkeypatch.setattr(optuna.storages, "RDBStorage", missing)
    with pytest.raises(StorageError, match=rf"used: No driver\. Its .* pip install {installed}\.$"):
        open_on(url)
