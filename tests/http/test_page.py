"""The page in a real browser: chromium loads it from the server, classifies, and is asked what it shows."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import quote

import pytest
from serving import LABELS, Dummy, Server, serving

from emoray.http.keys import Key, Keys

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")


def shown(url: str, folder: Path) -> str:
    """The document as it is once its scripts have run."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", f"--user-data-dir={folder}", "--virtual-time-budget=4000"]
    command += ["--enable-logging=stderr", "--dump-dom", url]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "Refused to" not in ran.stderr and "Uncaught" not in ran.stderr, ran.stderr[-2000:]
    return ran.stdout


def test_the_page_classifies_lines(endpoint: Server, tmp_path: Path) -> None:
    texts = ["i feel wonderful", "leave <b>me</b> alone", "שלום"]
    page = shown(f"{endpoint.url}/#text={quote(chr(10).join(texts))}", tmp_path)
    verdicts = re.findall(r'<h2 class="verdict">.*?</i>(\w+)</h2>', page)
    assert verdicts == [prediction.label for prediction in Dummy()(texts)]
    assert page.count('class="fill"') == len(texts) * len(LABELS)
    assert "leave &lt;b&gt;me&lt;/b&gt; alone" in page and "emotion@0123456789ab" in page


def test_the_page_shows_the_words_that_mattered(endpoint: Server, tmp_path: Path) -> None:
    text = "so glad 😀 it works"
    page = shown(f"{endpoint.url}/#text={quote(text)}&why=1", tmp_path)
    marked = re.search(r'<p class="marked".*?</p>', page)
    assert marked and re.sub(r"<[^>]+>", "", marked[0]) == text
    assert re.findall(r"<mark[^>]*>([^<]+)</mark>", marked[0]) == text.split()
    assert "because of" in page


def test_the_page_asks_for_a_key(tmp_path: Path) -> None:
    with serving(keys=Keys((Key("a", hashlib.sha256(b"key").digest()),))) as server:
        page = shown(f"{server.url}/#text=hello", tmp_path)
    assert "This endpoint needs a key." in page
    assert re.search(r'id="key-panel"\s*>', page), "the field for the key is hidden"


def test_the_docs_show_every_route(endpoint: Server, tmp_path: Path) -> None:
    page = shown(f"{endpoint.url}/docs", tmp_path)
    routes = set(endpoint.get("/openapi.json").json()["paths"])
    assert routes <= set(re.findall(r"<code>([^<]+)</code>", page)) and "curl -X POST" in page
