"""A running service listens on nothing beyond docs/security.md, and hears strangers only where that says so."""

import subprocess
import sys

import httpx
import psutil
import pytest
from listeners import listeners, too_open, undocumented
from service import Service

NODE = "127.0.0.2"
PROMPT = "quinquereme of nineveh"
READ_SECRET = """
import sys
from ray._raylet import GcsClient
print(GcsClient(address=sys.argv[1]).internal_kv_get(b"secret/corral", b"corral").hex())
"""


def family(service: Service) -> list[psutil.Process]:
    process = psutil.Process(service.process.pid)
    return [process, *process.children(recursive=True)]


def test_nothing_listens_that_is_not_documented(service: Service) -> None:
    found = listeners(family(service))
    assert len(found) > 25
    assert undocumented(found, NODE) == []


def test_what_asks_for_token_or_secret_asks(service: Service) -> None:
    assert too_open(listeners(family(service)), NODE) == []
    service.wait_healthy(1)  # the strangers disturbed nobody


def test_other_users_of_the_machine_cannot_get_at_its_files(service: Service) -> None:
    assert service.scratch.stat().st_mode & 0o077 == 0


def test_neither_token_nor_secret_nor_prompt_is_in_a_log(service: Service) -> None:
    body = {"model": service.model, "prompt": PROMPT, "max_tokens": 2}
    assert httpx.post(f"{service.url}/v1/completions", json=body, timeout=30).status_code == 200
    assert httpx.post(f"{service.url}/v1/completions", json=body | {"n": 0}, timeout=30).status_code == 400
    token = (service.scratch / "token").read_text()
    secret = pipeline_secret(service)
    hidden = [token.encode(), PROMPT.encode(), secret, secret.hex().encode(), repr(secret)[2:-1].encode()]
    logs = [service.log, *(path for path in (service.scratch / "ray").rglob("logs/**/*") if path.is_file())]
    assert len(logs) > 20
    assert [path for path in logs if any(text in path.read_bytes() for text in hidden)] == []


def pipeline_secret(service: Service) -> bytes:
    """As Ray gives it to who has the token. Asked for without, it is refused."""
    (gcs,) = [x for x in listeners(family(service)) if "gcs_server" in x.process]
    command = [sys.executable, "-c", READ_SECRET, f"{NODE}:{gcs.port}"]
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(service.scratch / "token")}
    reply = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    secret = bytes.fromhex(reply.stdout.strip())
    assert len(secret) == 32
    other = service.scratch / "other"
    other.write_text("0" * 64)
    refused = subprocess.run(
        command, env=environment | {"RAY_AUTH_TOKEN_PATH": str(other)}, capture_output=True, text=True, timeout=60
    )
    assert refused.returncode != 0 and secret.hex() not in refused.stdout
    return secret


def test_the_table_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener too many of a process that has rows, and one of a process that has none, are told."""
    import listeners as module

    few = [module.Row("raylet", "node", "all", "token")]
    monkeypatch.setattr(module, "documented", lambda: few)
    found = [module.Listener("/bin/raylet", "::", 1), module.Listener("/bin/raylet", "0.0.0.0", 2)]
    assert module.undocumented(found, NODE) == found[1:]
    assert module.undocumented([module.Listener("other", "::", 1)], NODE)
    assert module.undocumented([module.Listener("/bin/raylet", NODE, 1)], NODE)
