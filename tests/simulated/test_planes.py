"""The request planes under a whole topology, on simulated engines: what a client notices of them, which is nothing."""

from __future__ import annotations

import signal
import subprocess

import openai
import pytest

from support.cluster import Topology
from support.process import Process, free_port

LONG = {"prompt": "Hello", "max_tokens": 1500, "stream": True, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Flags of a worker and of a processor that show each other certificates."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    elliptic = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    openssl("req", "-x509", *elliptic, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=tests")
    for name in ("worker", "processor"):
        openssl("req", "-x509", *elliptic, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}",
                "-addext", f"subjectAltName=DNS:{name}", "-addext", "basicConstraints=critical,CA:FALSE",
                "-CA", "ca.pem", "-CAkey", "ca.key")

    def flags(name: str) -> tuple[str, ...]:
        return ("--request-plane-tls-cert", str(folder / f"{name}.pem"),
                "--request-plane-tls-key", str(folder / f"{name}.key"),
                "--request-plane-tls-ca", str(folder / "ca.pem"))

    return flags("worker"), (*flags("processor"), "--request-plane-tls-name", "worker")


@pytest.fixture(scope="module")
def nats(settings):
    """The flags of a NATS server."""
    port = str(free_port())
    server = Process("nats-server", ["nats-server", "-a", "127.0.0.1", "-p", port], settings.folder / "nats.log")
    yield "--nats-server", f"nats://127.0.0.1:{port}"
    server.stop()


@pytest.fixture(params=["tcp", "http", "tls", "https", "nats"])
def topology(request, settings, certificates, nats):
    plane = {"tls": "tcp", "https": "http"}.get(request.param, request.param)
    of_workers, of_processors = certificates if plane != request.param else ((), ())
    if plane == "nats":
        of_workers = of_processors = nats
    with Topology(settings, workers=2, engine="sim", worker_flags=("--request-plane", plane, *of_workers),
                  processor_flags=of_processors) as topology:
        schemes = {target["address"].rpartition("://")[0] or "tcp" for target in topology.processor.targets()}
        assert schemes == {request.param}
        yield topology


@pytest.fixture
def client(topology):
    with openai.OpenAI(base_url=f"{topology.api.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_every_plane_answers_and_survives_a_killed_worker(topology, client):
    answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=16)
    assert answer.usage.completion_tokens > 0
    stream = client.completions.create(model="tiny", **LONG)
    next(iter(stream))
    stream.close()
    topology.wait_idle()

    topology.workers[0].kill()
    for _ in range(4):
        assert client.completions.create(model="tiny", prompt="Hello", max_tokens=8).choices[0].text
    topology.workers[0].start().wait_ready()
    topology.wait_connected(2)


def test_a_worker_told_to_end_finishes_what_runs(topology, client):
    topology.workers[1].stop()
    topology.wait_connected(1)
    stream = client.completions.create(model="tiny", **LONG)
    next(iter(stream))
    process = topology.workers[0].process
    process.signal(signal.SIGTERM)
    chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert process.wait() == 0
