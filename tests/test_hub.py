"""Without a connection to the hub: what is not cached is refused at once, not after half a minute of attempts."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

from harness.config.schema import DatasetConfig, ModelConfig
from harness.content.errors import DataError, ModelError
from harness.content.hub import is_offline
from harness.data.sources import open_source
from harness.models.configs import read_config

HUB = ModelConfig(name="bert_base", hub_id="google-bert/bert-base-uncased", revision=None)
PAIRS = DatasetConfig(name="pairs", hub_id="nyu-mll/glue", subset="mrpc", text_columns=["sentence1", "sentence2"])


@pytest.fixture(autouse=True)
def _as_if_with_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    is_offline.cache_clear()
    yield
    is_offline.cache_clear()


def fail(*_: Any, **__: Any) -> None:
    raise OSError("no route to host")


def test_where_no_connection_opens_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", fail)
    # Whatever the libraries would send fails the test: they resolve the server's name first.
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ModelError, match="google-bert/bert-base-uncased could not be loaded"):
        read_config(HUB)
    with pytest.raises(DataError, match="split train of nyu-mll/glue could not be loaded"):
        open_source(PAIRS, with_test=False)


@pytest.mark.parametrize("proxy", [None, "http://localhost:1"])
def test_a_server_that_answers_or_a_proxy_is_left_to_the_libraries(
    monkeypatch: pytest.MonkeyPatch, proxy: str | None
) -> None:
    if proxy is None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
            assert not is_offline()
    else:
        monkeypatch.setenv("HTTPS_PROXY", proxy)
        monkeypatch.setattr(socket, "create_connection", fail)
        assert not is_offline()
    assert not constants.HF_HUB_OFFLINE
