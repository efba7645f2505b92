"""API keys: kept as sha256 sums, compared in constant time, several at once so that they can be rotated.

A keys file has one key a line, `[admin] NAME SHA256`; `#` begins a comment. `python -m emoray.http.keys NAME [--admin]`
makes a key and prints it with its line. Where there is no file, EMORAY_API_KEYS may hold the keys themselves,
`NAME=KEY` or `admin:NAME=KEY` with commas or spaces between.

Keys are long and random, so a plain sha256 is enough: there is no dictionary to try. Short ones are refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from emoray.errors import ConfigError
from emoray.http.errors import RequestError

VARIABLE = "EMORAY_API_KEYS"
SHORTEST = 16
"""Characters of a key, at least."""
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SUM = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Key:
    """A key that is accepted.

    Attributes:
        name: for the log.
        digest: sha256 of the key.
        admin: may change the model.
    """

    name: str
    digest: bytes
    admin: bool = False

    def line(self) -> str:
        """As in a keys file: name and sum, from which the key can't be had."""
        return f"{'admin ' if self.admin else ''}{self.name} {self.digest.hex()}"


class Keys:
    """The keys of an endpoint; none at all leaves it open, but for what needs an admin."""

    def __init__(self, keys: tuple[Key, ...] = ()) -> None:
        self._keys = keys

    def lines(self) -> list[str]:
        """As in a keys file."""
        return [key.line() for key in self._keys]

    def __bool__(self) -> bool:
        return bool(self._keys)

    def check(self, headers: Mapping[bytes, bytes], admin: bool = False) -> str | None:
        """The name of the request's key; None where no keys are set.

        Raises:
            RequestError: `unauthorized`, or `forbidden` where an admin's key is needed.
        """
        if not self._keys:
            if admin:
                raise RequestError("forbidden", "this needs an admin key, and none is set: see auth.keys_file")
            return None
        given = _given(headers)
        if given is None:
            raise _unauthorized("a key is needed: send it as 'Authorization: Bearer KEY'")
        digest = hashlib.sha256(given).digest()
        found: Key | None = None
        for key in self._keys:  # all of them, always: the time must not tell which one came near
            if hmac.compare_digest(key.digest, digest):
                found = key
        if found is None:
            raise _unauthorized("this key is not known here")
        if admin and not found.admin:
            raise RequestError("forbidden", f"the key '{found.name}' is a client's; this needs an admin's")
        return found.name


def _unauthorized(sentence: str) -> RequestError:
    return RequestError("unauthorized", sentence, headers=((b"www-authenticate", b'Bearer realm="emoray"'),))


def _given(headers: Mapping[bytes, bytes]) -> bytes | None:
    """The key in a request's headers: Bearer, the password of Basic (Triton's BasicAuth plugin), or X-API-Key."""
    scheme, _, value = headers.get(b"authorization", b"").strip().partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip() or None
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2] or None
        except binascii.Error:
            return None
    return headers.get(b"x-api-key", b"").strip() or None


def load(keys_file: str | None) -> Keys:
    """Keys from a file, else from EMORAY_API_KEYS, else none.

    Raises:
        ConfigError: with every line that is wrong; keys themselves are never shown.
    """
    if keys_file is not None:
        return _read(keys_file)
    return _from_variable(os.environ.get(VARIABLE, ""))


def _read(path: str) -> Keys:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(path, [f"auth.keys_file can't be read: {error}"]) from None
    keys = parse(lines, path)
    if not keys:
        raise ConfigError(path, ["holds no key: add one, or leave auth.keys_file null for an open endpoint"])
    return keys


def parse(lines: Sequence[str], subject: str) -> Keys:
    """Keys from the lines of a keys file.

    Raises:
        ConfigError: with every line that is wrong.
    """
    keys, problems = [], []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        admin = len(words) == 3 and words[0] == "admin"
        if len(words) - admin != 2 or not _NAME.fullmatch(words[-2]) or not _SUM.fullmatch(words[-1].lower()):
            problems.append(
                f"line {number}: must be '[admin] NAME SHA256' with the key's sum, 64 hex digits: "
                "`python -m emoray.http.keys NAME` makes one"
            )
            continue
        keys.append(Key(words[-2], bytes.fromhex(words[-1]), admin))
    if problems:
        raise ConfigError(subject, problems)
    return Keys(tuple(keys))


def _from_variable(value: str) -> Keys:
    keys, problems = [], []
    for number, entry in enumerate(re.split(r"[,\s]+", value.strip(", \t\n")) if value.strip(", \t\n") else [], 1):
        admin = entry.startswith("admin:")
        name, equals, key = entry.removeprefix("admin:").partition("=")
        if not equals:
            name, key = f"key{number}", name
        if not _NAME.fullmatch(name) or len(key) < SHORTEST:
            problems.append(f"entry {number}: must be [admin:]NAME=KEY with a key of {SHORTEST} characters or more")
            continue
        keys.append(Key(name, hashlib.sha256(key.encode()).digest(), admin))
    if problems:
        raise ConfigError(VARIABLE, problems)
    return Keys(tuple(keys))


def new(name: str, admin: bool = False) -> tuple[str, str]:
    """A fresh key, and its line for a keys file."""
    key = secrets.token_urlsafe(32)
    return key, Key(name, hashlib.sha256(key.encode()).digest(), admin).line()


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--admin"]
    if len(arguments) != 1 or arguments[0].startswith("-") or not _NAME.fullmatch(arguments[0]):
        sys.exit("usage: python -m emoray.http.keys NAME [--admin]")
    made, line = new(arguments[0], "--admin" in sys.argv[1:])
    sys.stderr.write(f"key (shown once): {made}\n")
    sys.stdout.write(f"{line}\n")  # alone, so that `>> keys` makes the file
