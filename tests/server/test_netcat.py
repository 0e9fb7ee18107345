"""Common tools, such as netcat, are complete clients."""

import subprocess
from pathlib import Path

import pytest

from support.files import append, random_bytes
from support.server import Serve
from support.tools import missing
from support.waiting import DEADLINE

DATA = random_bytes(3000)
APPENDED = b"appended while connected\n"

# Each command is written as in docs/clients.md, and gets HOST and PORT from its environment.
CLIENTS = {
    "nc.openbsd": "echo 1000 | nc.openbsd $HOST $PORT",
    "nc.openbsd -N": "echo 1000 | nc.openbsd -N $HOST $PORT",
    "nc.traditional": "echo 1000 | nc.traditional $HOST $PORT",
    "busybox nc": "echo 1000 | busybox nc $HOST $PORT",
    "ncat": "echo 1000 | ncat $HOST $PORT",
    "socat": "echo 1000 | socat -,ignoreeof TCP:$ADDRESS:$PORT",
    "bash": "exec 3<>/dev/tcp/$HOST/$PORT && echo 1000 >&3 && cat <&3",
}


@pytest.mark.sample(2)
@pytest.mark.slow
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("client", CLIENTS)
def test_common_tools(serve: Serve, path: Path, client: str, host: str) -> None:
    """The tool prints the file from byte 1000 to its end, including what is appended meanwhile."""
    if reason := missing(client.split()[0]):
        pytest.skip(reason)
    if client == "nc.traditional" and ":" in host:
        pytest.skip("nc.traditional does not support IPv6")
    path.write_bytes(DATA)
    server = serve(path)
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOST": host,
        "ADDRESS": f"[{host}]" if ":" in host else host,
        "PORT": str(server.port),
    }
    command = ["timeout", str(DEADLINE), "bash", "-c", CLIENTS[client]]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(2000) == DATA[1000:]
        append(path, APPENDED)
        assert process.stdout.read(len(APPENDED)) == APPENDED
        append(path, DATA)
        server.process.terminate()
        assert process.stdout.read() == DATA
        assert process.wait(DEADLINE) == 0
