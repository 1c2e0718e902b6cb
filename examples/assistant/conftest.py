"""The gateway of docs/from-litellm-proxy.md: a server, a worker, the front, and a stand-in for the provider."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

HERE = Path(__file__).parent
AIQUEUE = [sys.executable, "-m", "aiqueue"]
KEYS = {
    "chat": ["--model", "small", "--model", "shaky", "--model", "embed"],
    "slow": ["--model", "small", "--requests", "2"],
    "poor": ["--model", "small", "--budget", "0.000001"],
}


@pytest.fixture(scope="session")
def gateway(tmp_path_factory):
    """Its address, and the key by name."""
    directory = tmp_path_factory.mktemp("gateway")
    provider, front = free_port(), free_port()
    config = (HERE / "gateway.toml").read_text().replace("8101", str(provider))
    (directory / "gateway.toml").write_text(config)
    env = {
        **os.environ,
        "PROVIDER_KEY": "sk-provider",
        "AIQUEUE_GATEWAY": str(directory / "gateway.toml"),
        "AIQUEUE_DIRECTORY": str(directory / ".aiqueue"),
    }
    commands = [
        [sys.executable, "-m", "aiqueue.gateway.standin", "--port", str(provider)],
        [*AIQUEUE, "work", "aiqueue.gateway:worker"],
        [*AIQUEUE, "gateway", "serve", "--port", str(front)],
    ]
    running = [subprocess.Popen(command, cwd=directory, env=env) for command in commands]
    try:
        keys = {}
        for name, options in KEYS.items():
            add = [*AIQUEUE, "gateway", "keys", "add", "desk", "--name", name, *options, "--json"]
            keys[name] = json.loads(subprocess.check_output(add, cwd=directory, env=env))["token"]
        wait_for(f"http://127.0.0.1:{front}/readyz")
        yield f"http://127.0.0.1:{front}/v1", keys
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(url):
    for _ in range(300):
        try:
            return urllib.request.urlopen(url)
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(url)
