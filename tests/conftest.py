"""Options and the fixtures that every suite shares.

Real engines take seconds to start, so each is started once per run, and only when a
test asks for it.
"""

from __future__ import annotations

import pytest

from support.api import Api
from support.cluster import Reference, Settings


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("stator")
    group.addoption("--reference-url", help="a running vLLM server, instead of starting one")
    group.addoption("--candidate-url", help="a running server to compare with it, instead of starting ours")


@pytest.fixture(scope="session")
def settings(tmp_path_factory) -> Settings:
    return Settings.from_environment(tmp_path_factory.mktemp("stator"))


@pytest.fixture(scope="session")
def reference(request, settings):
    """vLLM's own server."""
    url = request.config.getoption("--reference-url")
    if url:
        yield Api(url)
        return
    with Reference(settings) as server:
        yield server.api


@pytest.fixture(scope="session")
def candidate(request, settings):
    """Our processor and worker, on a real engine."""
    url = request.config.getoption("--candidate-url")
    yield Api(url)
