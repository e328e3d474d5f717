"""deploy/local-tls.yaml, but for its ports and files, and with API keys: `ray start`, `serve deploy`, then HTTPS and
gRPC over TLS.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
import yaml
from certificates import Authority, Identity
from listeners import listeners, too_open, undocumented
from service import free_port

from cluster.private_ray import apply_environment
from protos import inference_pb2, inference_pb2_grpc

pytestmark = pytest.mark.timeout(180)

BIN = Path(sys.executable).parent
DEPLOY = Path(__file__).parents[2] / "deploy" / "local-tls.yaml"
HOST, NODE = "127.0.0.1", "127.0.0.2"
KEY = "open-sesame-5f1d"
METADATA = (("authorization", f"Bearer {KEY}"),)
ASK = inference_pb2.GenerateRequest(
    text="hello",
    sampling=inference_pb2.Sampling(temperature=0),
    stopping=inference_pb2.Stopping(max_tokens=4, ignore_eos=True),
)


@dataclass
class Deployed:
    authority: Authority
    ports: dict[str, int]
    head: psutil.Process
    scratch: Path
    server: Identity

    @contextmanager
    def secure(self, port: str, ca: str, identity: Identity | None = None) -> Iterator[Any]:
        """A stub that trusts the authority `ca`."""
        pair = [Path(file).read_bytes() for file in (identity.keyfile, identity.certfile)] if identity else []
        credentials = grpc.ssl_channel_credentials(Path(ca).read_bytes(), *pair)
        with grpc.secure_channel(f"{HOST}:{self.ports[port]}", credentials) as channel:
            yield inference_pb2_grpc.InferenceStub(channel)

    @contextmanager
    def plain(self, port: str) -> Iterator[Any]:
        with grpc.insecure_channel(f"{HOST}:{self.ports[port]}") as channel:
            yield inference_pb2_grpc.InferenceStub(channel)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    folder = tmp_path_factory.mktemp("tls")
    authority = Authority(folder)
    ports = {name: free_port() for name in ("https", "plain", "secure", "mutual", "gcs", "dashboard")}
    server, config = authority.issue("server"), folder / "deploy.yaml"
    (folder / "keys").write_text(f"{KEY}\n")
    config.write_text(yaml.safe_dump(adapted(server, authority.certfile, ports, folder / "keys")))
    scratch = Path(f"/tmp/corral-tls{ports['gcs']}")  # short: socket paths end at 107 bytes
    scratch.mkdir(mode=0o700)
    environment = dict(os.environ)
    apply_environment(environment, scratch, "proxy", scratch / "token")
    dashboard = f"http://{HOST}:{ports['dashboard']}"
    try:
        with ray_head(environment, scratch / "ray", ports) as head:
            until(lambda: httpx.get(f"{dashboard}/api/gcs_healthz").status_code == 200)
            deploy = [BIN / "serve", "deploy", "-a", dashboard, config]
            subprocess.run(deploy, env=environment, check=True, capture_output=True, timeout=60)
            with httpx.Client(verify=authority.certfile) as client:
                until(lambda: client.get(f"https://{HOST}:{ports['https']}/health").status_code == 200)
            yield Deployed(authority, ports, head, scratch, server)
    finally:
        shutil.rmtree(scratch)


def adapted(server: Identity, ca: str, ports: dict[str, int], keys: Path) -> dict[str, Any]:
    """The file with this test's ports, certificates and API keys, and a gRPC port for clients with certificates."""
    text = DEPLOY.read_text().replace("/etc/corral/tls.crt", server.certfile)
    text = text.replace("/etc/corral/tls.key", server.keyfile).replace("port=9443", f"port={ports['secure']}")
    config: dict[str, Any] = yaml.safe_load(text)
    config["http_options"]["port"], config["grpc_options"]["port"] = ports["https"], ports["plain"]
    functions = config["grpc_options"]["grpc_servicer_functions"]
    functions.insert(0, functions[0].replace(str(ports["secure"]), str(ports["mutual"])) + f",ssl_ca_certs={ca}")
    config["applications"][0]["args"]["ingress"] = {"api_keys_file": str(keys)}
    return config


@contextmanager
def ray_head(environment: dict[str, str], folder: Path, ports: dict[str, int]) -> Iterator[psutil.Process]:
    """`ray start --head` of our own; it ends with all that it started."""
    flags = {
        "node-ip-address": NODE, "port": ports["gcs"], "dashboard-port": ports["dashboard"], "temp-dir": folder,
        "ray-client-server-port": free_port(), "dashboard-agent-listen-port": free_port(),
        "metrics-export-port": free_port(), "object-store-memory": 80_000_000, "num-cpus": 8,
    }  # fmt: skip
    command = [BIN / "ray", "start", "--head", "--block", *(f"--{name}={value}" for name, value in flags.items())]
    head = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield psutil.Process(head.pid)
    finally:
        family = [*psutil.Process(head.pid).children(recursive=True), head]
        for process in family:  # at SIGTERM it would take its time
            process.kill()
        psutil.wait_procs(family[:-1], timeout=15)
        head.wait(15)


def until(condition: Callable[[], bool], timeout_s: float = 90.0) -> None:
    ends_s = time.monotonic() + timeout_s
    while True:
        try:
            if condition():
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < ends_s, "the service does not come up"
        time.sleep(0.2)


def refusal(call: Callable[[], Any]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as e:
        call()
    return e.value.code()


def test_both_fronts_answer_over_tls(deployed: Deployed) -> None:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    url = f"https://{HOST}:{deployed.ports['https']}/v1/completions"
    client = httpx.Client(verify=deployed.authority.certfile, timeout=30)
    reply = client.post(url, json=body | {"return_token_ids": True}, headers=dict(METADATA))
    assert client.post(url, json=body).status_code == 401
    with deployed.secure("secure", deployed.authority.certfile) as stub:
        whole = stub.Generate(ASK, timeout=30, metadata=METADATA)
        chunks = list(stub.GenerateStream(ASK, timeout=30, metadata=METADATA))
        assert refusal(lambda: stub.Generate(ASK, timeout=30)) is grpc.StatusCode.UNAUTHENTICATED
    streamed = [token_id for chunk in chunks for token_id in chunk.token_ids]
    assert streamed == list(whole.choices[0].token_ids) == reply.json()["choices"][0]["token_ids"]
    assert len(streamed) == 4


def test_a_server_whose_authority_is_unknown_is_not_spoken_to(deployed: Deployed, tmp_path: Path) -> None:
    other = Authority(tmp_path).certfile
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"https://{HOST}:{deployed.ports['https']}/health", verify=other)
    with deployed.secure("secure", other) as stub:
        assert refusal(lambda: stub.Generate(ASK, timeout=5)) is grpc.StatusCode.UNAVAILABLE


def test_plain_text_is_refused(deployed: Deployed) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://{HOST}:{deployed.ports['https']}/health", timeout=5)
    with deployed.plain("secure") as stub:
        assert refusal(lambda: stub.Generate(ASK, timeout=5)) is grpc.StatusCode.UNAVAILABLE
    with deployed.plain("plain") as stub:
        assert refusal(lambda: stub.Generate(ASK, timeout=5)) is grpc.StatusCode.UNAUTHENTICATED
        assert refusal(lambda: next(stub.GenerateStream(ASK, timeout=5))) is grpc.StatusCode.UNAUTHENTICATED


def test_clients_can_be_made_to_show_a_certificate(deployed: Deployed, tmp_path: Path) -> None:
    ca = deployed.authority.certfile
    with deployed.secure("mutual", ca, deployed.authority.issue("client")) as stub:
        assert stub.Generate(ASK, timeout=30, metadata=METADATA).choices
    for identity in (None, Authority(tmp_path).issue("client")):
        with deployed.secure("mutual", ca, identity) as stub:
            assert refusal(lambda: stub.Generate(ASK, timeout=5)) is grpc.StatusCode.UNAVAILABLE


def test_nothing_listens_that_is_not_documented(deployed: Deployed) -> None:
    found = listeners([deployed.head, *deployed.head.children(recursive=True)])
    assert any(listener.port == deployed.ports["dashboard"] for listener in found)
    found = [listener for listener in found if listener.port != deployed.ports["mutual"]]  # the file states one less
    assert undocumented(found, NODE) == []
    assert too_open(found, NODE) == []


def test_no_key_and_no_token_is_in_a_log(deployed: Deployed) -> None:
    private_key = Path(deployed.server.keyfile).read_bytes().splitlines()[1]
    hidden = (private_key, (deployed.scratch / "token").read_bytes(), KEY.encode())
    logs = [path for path in (deployed.scratch / "ray").rglob("logs/**/*") if path.is_file()]
    assert len(logs) > 20
    assert [path for path in logs if any(text in path.read_bytes() for text in hidden)] == []
