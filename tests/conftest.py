"""Options and the fixtures that every suite shares.

Real engines take seconds to start, so each is started once per run, and only when a
test asks for it.
"""

from __future__ import annotations

import signal

import pytest

from support.api import Api
from support.cluster import Reference, Settings, Topology


def pytest_configure() -> None:
    # Ended from outside, the tests end what they started, as with Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("ended by SIGTERM", 143))


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
def topology(settings):
    """A processor and a worker on a real engine."""
    with Topology(settings) as topology:
        yield topology


@pytest.fixture(scope="session")
def candidate(request):
    """The server under test: that of `topology` unless another one is given."""
    url = request.config.getoption("--candidate-url")
    return Api(url) if url else request.getfixturevalue("topology").api


@pytest.fixture(scope="session")
def simulated(settings):
    """A processor and two workers on simulated engines."""
    with Topology(settings, workers=2, engine="sim") as topology:
        yield topology
