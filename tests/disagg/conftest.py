"""Prefill and decode workers on real engines that hand KV over with NIXL, without a GPU."""

from __future__ import annotations

import pytest

from support.cluster import Topology, connector


@pytest.fixture(scope="session")
def pd(settings):
    """A processor, a prefill worker and a decode worker."""
    with Topology(settings, {"prefill": 1, "decode": 1}, worker_flags=connector()) as topology:
        yield topology
