"""Keys: who gets in, how they are kept, and what is wrong with a file of them."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Server, serving

from emoray.errors import ConfigError
from emoray.http import keys as api_keys
from emoray.http.routes import ROUTES

OLD, NEW, ADMIN = "the-old-key-of-a-client", "the-new-key-of-a-client", "the-key-of-an-admin"


@pytest.fixture(scope="module")
def keyed() -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(api_keys.VARIABLE, f"{OLD}, app={NEW} admin:boss={ADMIN}")
        keys = api_keys.load(None)
    with serving(keys=keys) as server:
        yield server


BODY = {"texts": ["a"]}


def basic(key: str) -> str:
    return "Basic " + base64.b64encode(f"me:{key}".encode()).decode()


@pytest.mark.parametrize("key", [OLD, NEW, ADMIN])
@pytest.mark.parametrize("scheme", ["Bearer {}", "bearer  {}", "basic", "x-api-key"])
def test_every_key_in_every_scheme(keyed: Server, key: str, scheme: str) -> None:
    headers = {"Authorization": basic(key) if scheme == "basic" else scheme.format(key)}
    if scheme == "x-api-key":
        headers = {"X-API-Key": key}
    assert keyed.post("/v1/classify", BODY, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Bearer {OLD}x",
        f"Bearer {OLD[:-1]}",
        OLD,
        f"Digest {OLD}",
        "Basic !!!",
        "Basic",
        basic("wrong"),
        basic(""),
        b"Bearer \xff\xfe",
        "Bearer " + "x" * 5000,
    ],
)
def test_no_key_and_wrong_keys(keyed: Server, authorization: str | bytes | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    answer = keyed.post("/v1/classify", BODY, headers=headers)
    assert answer.status_code == 401 and answer.json()["error_type"] == "unauthorized"
    assert answer.headers["www-authenticate"].startswith("Bearer")


def test_everything_but_health_and_the_bare_pages_needs_a_key(keyed: Server) -> None:
    for route in ROUTES:
        path = route.path.replace("{name}", "emotion").replace("{version}", "0123456789ab")
        status = keyed.session.request(route.method, keyed.url + path, timeout=5).status_code
        assert (status == 401) is not route.is_open, path
    opened = {route.path for route in ROUTES if route.is_open}
    assert opened == {"/health", "/ready", "/v2/health/live", "/v2/health/ready", "/", "/docs"}


def test_admins_are_apart(keyed: Server) -> None:
    for key, status in ((OLD, 403), (ADMIN, 202)):
        answer = keyed.session.put(
            keyed.url + "/v1/model", json={"model": "dummy"}, headers={"Authorization": f"Bearer {key}"}, timeout=5
        )
        assert answer.status_code == status, answer.text


def test_without_keys_nobody_is_an_admin(endpoint: Server) -> None:
    answer = endpoint.session.put(endpoint.url + "/v1/model", json={"model": "dummy"}, timeout=5)
    assert answer.status_code == 403 and "auth.keys_file" in answer.json()["error"]


def test_a_keys_file(tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "emoray.http.keys", "boss", "--admin"], capture_output=True, text=True, check=True
    )
    asked = subprocess.run([sys.executable, "-m", "emoray.http.keys", "--help"], capture_output=True, text=True)
    assert asked.returncode == 1 and asked.stdout == "" and asked.stderr.startswith("usage:"), "no key is named --help"
    key, line = made.stderr.split(":", 1)[1].strip(), made.stdout.strip()
    other, other_line = api_keys.new("app")
    path = tmp_path / "keys"
    path.write_text(f"# ours\n{line}\n\n{other_line}  # the web app's\n")
    assert key not in path.read_text() and other not in path.read_text()
    keys = api_keys.load(str(path))
    assert keys.check({b"authorization": f"Bearer {key}".encode()}, admin=True) == "boss"
    assert keys.check({b"x-api-key": other.encode()}) == "app"


def test_all_wrong_lines_of_a_file_are_named_and_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"app {'0' * 64}\napp my-secret-in-plain\nadmin {'0' * 64}\nroot app {'0' * 64}\n")
    with pytest.raises(ConfigError) as error:
        api_keys.load(str(path))
    assert [p.split(":")[0] for p in error.value.problems] == ["line 2", "line 4"]
    assert "secret" not in str(error.value)
    path.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="holds no key"):
        api_keys.load(str(path))
    with pytest.raises(ConfigError, match="can't be read"):
        api_keys.load(str(tmp_path / "none"))


def test_short_keys_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(api_keys.VARIABLE, "app=hunter2")
    with pytest.raises(ConfigError, match="16 characters") as error:
        api_keys.load(None)
    assert "hunter2" not in str(error.value)
    monkeypatch.setenv(api_keys.VARIABLE, " \n")
    assert not api_keys.load(None)
