"""configs/serve.yaml says the defaults, and what is wrong in a file of one's own is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from emoray.errors import ConfigError
from emoray.serve_config import ServeConfig, load

FILE = Path(__file__).parents[2] / "configs" / "serve.yaml"


def test_the_file_shows_every_key_with_its_default() -> None:
    assert load(FILE) == ServeConfig()
    written = yaml.safe_load(FILE.read_text())
    assert written.keys() == ServeConfig.model_fields.keys()
    for section, content in written.items():
        if isinstance(content, dict):
            assert content.keys() == getattr(ServeConfig(), section).model_dump().keys(), section


def test_it_listens_on_this_machine_alone_unless_told_otherwise() -> None:
    assert load(None).http.host == "127.0.0.1"


def test_all_problems_at_once() -> None:
    overrides = [
        "http.proxy_ports=[1, 2]",
        "http.replica_ports=[9, 3]",
        "replicas.min=9",
        "limits.max_text=3",
        "http.port=70000",
        "engine=tensorflow",
        "limits.timeout_s=0",
    ]
    with pytest.raises(ConfigError) as error:
        load(None, overrides)
    text = str(error.value)
    for word in (
        "replicas",
        "did you mean 'max_texts'?",
        "http.port",
        "http.proxy_ports",
        "engine",
        "limits.timeout_s",
    ):
        assert word in text, text
