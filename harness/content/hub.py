"""The server of models and datasets, which a machine may not reach."""

from __future__ import annotations

import socket
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants


@cache
def is_offline() -> bool:
    """Whether nothing is asked of the hub: by HF_HUB_OFFLINE, or because no connection to its server can be opened.

    In that case the hub's library and transformers are put into their offline mode. They ask six times for each file
    otherwise, half a minute for a model, before they look what is cached. Behind a proxy they are left alone.
    """
    server = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or server.hostname is None or getproxies().keys() & {"https", "all"}:
        return constants.HF_HUB_OFFLINE
    try:
        socket.create_connection((server.hostname, server.port or 443), timeout=5).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True
    return constants.HF_HUB_OFFLINE
