"""One file a dialect; `ROUTES` is all of them."""

from __future__ import annotations

from emoray.http.routes import about, huggingface, infinity, kserve, own, tei

ROUTES = (
    *own.ROUTES,
    *huggingface.ROUTES,
    *tei.ROUTES,
    *infinity.ROUTES,
    *kserve.ROUTES,
    *about.ROUTES,
)
