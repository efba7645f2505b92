"""The binary form of KServe V2 tensors: JSON, then each string as `<u32 little-endian length><bytes>`."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from emoray.http.errors import RequestError, invalid
from emoray.http.schemas import is_blank

OCTETS = b"application/octet-stream"
LENGTH = b"inference-header-content-length"
_WORD = struct.Struct("<I")


def split(body: bytes, length: bytes | None) -> tuple[bytes, bytes]:
    """The JSON and the binary part of a body.

    Args:
        length: the header's value; None where there is none, and the whole body is JSON.
    """
    if length is None:
        return body, b""
    if not length.isdigit() or len(length) > 18 or int(length) > len(body):
        raise RequestError(
            "malformed", f"Inference-Header-Content-Length must be a whole number up to the body's {len(body)} bytes"
        )
    return body[: int(length)], body[int(length) :]


def strings(data: bytes, size: object, count: int) -> list[str]:
    """The strings of a tensor that takes up all of `data`.

    Args:
        size: what the tensor's `binary_data_size` says.
        count: what its shape says.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise invalid("inputs[0].parameters.binary_data_size: must be a whole number, 0 or more")
    if size != len(data):
        raise RequestError("malformed", f"binary_data_size is {size}, but {len(data)} bytes follow the JSON")
    texts: list[str] = []
    place = 0
    while place < size:
        if place + 4 > size:
            raise RequestError("malformed", f"the binary tensor ends within the length of text {len(texts)}")
        (length,) = _WORD.unpack_from(data, place)
        place += 4
        if length > size - place:
            raise RequestError(
                "malformed", f"text {len(texts)} says it has {length} bytes, but only {size - place} are left"
            )
        texts.append(_text(data[place : place + length], len(texts)))
        place += length
    if len(texts) != count:
        raise invalid(f"inputs[0]: the shape says {count} texts, but the binary tensor holds {len(texts)}")
    return texts


def _text(data: bytes, place: int) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise invalid(f"text {place} of the binary tensor is not UTF-8") from None
    if is_blank(text):
        raise invalid(f"text {place} of the binary tensor is empty or blank")
    return text


def pack(texts: Iterable[str]) -> bytes:
    """Strings as a binary tensor."""
    parts = []
    for text in texts:
        data = text.encode("utf-8")
        parts += [_WORD.pack(len(data)), data]
    return b"".join(parts)
