"""Channels with keys: who knows the pipeline's secret is let in, nobody else is, and nothing is readable on the way."""

import logging
import secrets
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import zmq
import zmq.asyncio
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from actors.wire import MAX_FRAME_BYTES, ChannelKeys, bind_any, open_socket

HOST = "127.0.0.1"
SOON_MS = 5000
NEVER_MS = 300  # a connection that is let in answers within 5 ms


@pytest.fixture
def keys() -> ChannelKeys:
    return ChannelKeys.from_secret(secrets.token_bytes(32))


@pytest.fixture
def contexts() -> Iterator[list[zmq.Context[Any]]]:
    """A server's context and a client's, each destroyed as the code under test does it."""
    pair: list[zmq.Context[Any]] = [zmq.Context(), zmq.Context()]
    yield pair
    for context in pair:
        context.destroy(linger=0)


def serve(context: zmq.Context[Any], keys: ChannelKeys | None) -> tuple[zmq.Socket[Any], str]:
    server = open_socket(context, zmq.ROUTER, keys, server=True)
    return server, bind_any(server, HOST)


def call(server: zmq.Socket[Any], client: zmq.Socket[Any], text: bytes = b"?") -> bytes:
    client.send(text)
    assert server.poll(SOON_MS), "the message did not arrive"
    identity, data = server.recv_multipart()
    server.send_multipart([identity, data + b"!"])
    assert client.poll(SOON_MS), "the answer did not arrive"
    return client.recv()


def test_both_ends_with_the_secret_talk(keys: ChannelKeys, contexts: list[zmq.Context[Any]]) -> None:
    server, endpoint = serve(contexts[0], keys)
    client = open_socket(contexts[1], zmq.DEALER, keys)
    client.connect(endpoint)
    assert call(server, client) == b"?!"


def test_all_servers_of_a_context_let_in_who_knows_the_secret(
    keys: ChannelKeys, contexts: list[zmq.Context[Any]]
) -> None:
    """A rank listens on several sockets; one doorkeeper answers for all of them."""
    for _ in range(3):
        server, endpoint = serve(contexts[0], keys)
        client = open_socket(contexts[1], zmq.DEALER, keys)
        client.connect(endpoint)
        assert call(server, client) == b"?!"


@pytest.mark.parametrize("stranger", ["no keys", "another secret", "the server's key alone", "the pair of the server"])
def test_a_stranger_gets_nothing_through(
    stranger: str, keys: ChannelKeys, contexts: list[zmq.Context[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    """Even one who learnt the server's public key; and members are served on."""
    server, endpoint = serve(contexts[0], keys)
    client = contexts[1].socket(zmq.DEALER)
    if stranger == "another secret":
        client.close()
        client = open_socket(contexts[1], zmq.DEALER, ChannelKeys.from_secret(secrets.token_bytes(32)))
    elif stranger != "no keys":
        own = zmq.curve_keypair() if stranger == "the server's key alone" else (keys.server.public, keys.server.secret)
        client.curve_serverkey = keys.server.public
        client.curve_publickey, client.curve_secretkey = own
    client.setsockopt(zmq.LINGER, 0)
    client.connect(endpoint)
    client.send(b"let me in")
    assert not server.poll(NEVER_MS)
    if stranger not in ("no keys", "another secret"):  # those do not get as far as showing a key
        assert "refused a connection from 127.0.0.1" in caplog.text
    member = open_socket(contexts[1], zmq.DEALER, keys)
    member.connect(endpoint)
    assert call(server, member) == b"?!"


def test_a_member_does_not_talk_to_a_false_server(keys: ChannelKeys, contexts: list[zmq.Context[Any]]) -> None:
    for false_keys in (None, ChannelKeys.from_secret(secrets.token_bytes(32))):
        server, endpoint = serve(contexts[0], false_keys)
        member = open_socket(contexts[1], zmq.DEALER, keys)
        member.connect(endpoint)
        member.send(b"a prompt")
        assert not server.poll(NEVER_MS)


def test_a_refused_client_hears_of_it(keys: ChannelKeys, contexts: list[zmq.Context[Any]]) -> None:
    """The ingress watches these events to know that its connection is lost."""
    server, endpoint = serve(contexts[0], keys)
    client = contexts[1].socket(zmq.DEALER)
    client.curve_serverkey = keys.server.public
    client.curve_publickey, client.curve_secretkey = zmq.curve_keypair()
    monitor = client.get_monitor_socket()
    client.connect(endpoint)
    seen = set()
    while not seen & {zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED, zmq.EVENT_HANDSHAKE_FAILED_AUTH}:
        assert monitor.poll(SOON_MS)
        seen.add(recv_monitor_message(monitor)["event"])
    assert zmq.EVENT_HANDSHAKE_SUCCEEDED not in seen
    client.disable_monitor()
    monitor.close(0)
    server.close(0)


def test_without_a_doorkeeper_nobody_is_let_in(
    keys: ChannelKeys, contexts: list[zmq.Context[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.wire._post_doorkeeper", lambda context, keys: None)
    server, endpoint = serve(contexts[0], keys)
    client = open_socket(contexts[1], zmq.DEALER, keys)
    client.connect(endpoint)
    client.send(b"?")
    assert not server.poll(NEVER_MS)


def test_nothing_readable_travels(keys: ChannelKeys, contexts: list[zmq.Context[Any]]) -> None:
    """A wire tap between both ends sees neither the message nor any of the keys."""
    server, endpoint = serve(contexts[0], keys)
    tapped = bytearray()
    with socket.create_server((HOST, 0)) as tap:
        thread = threading.Thread(target=relay, args=(tap, int(endpoint.rpartition(":")[2]), tapped), daemon=True)
        thread.start()
        client = open_socket(contexts[1], zmq.DEALER, keys)
        client.connect(f"tcp://{HOST}:{tap.getsockname()[1]}")
        assert call(server, client, b"the secret prompt") == b"the secret prompt!"
        client.close(0)
        thread.join(5)
    assert len(tapped) > 500
    for text in (b"secret prompt", keys.client.public, keys.server.public, keys.client.secret, keys.server.secret):
        assert text not in tapped


def relay(listener: socket.socket, port: int, tapped: bytearray) -> None:
    """Carries one connection until the client closes it, keeping all that passes."""

    def carry(source: socket.socket, sink: socket.socket) -> None:
        while data := source.recv(65536):
            tapped.extend(data)
            sink.sendall(data)

    near, _ = listener.accept()
    with near, socket.create_connection((HOST, port)) as far:
        back = threading.Thread(target=carry, args=(far, near), daemon=True)
        back.start()
        carry(near, far)
        far.shutdown(socket.SHUT_WR)
        back.join(5)


def test_the_doorkeeper_ends_with_its_context(keys: ChannelKeys) -> None:
    """Routers come and go in a process, and must leave no thread behind; both ways of ending a context are used."""
    before = set(threading.enumerate())
    for end in ("destroy", "term"):
        context: zmq.Context[Any] = zmq.Context()
        server, _ = serve(context, keys)
        assert len(set(threading.enumerate()) - before) == 1
        if end == "term":
            server.close(0)
            context.term()
        else:
            context.destroy(linger=0)
        for doorkeeper in set(threading.enumerate()) - before:
            doorkeeper.join(5)
        assert set(threading.enumerate()) == before


async def test_an_asyncio_client_talks_to_a_server(keys: ChannelKeys, contexts: list[zmq.Context[Any]]) -> None:
    server, endpoint = serve(contexts[0], keys)
    context = zmq.asyncio.Context()
    client = open_socket(context, zmq.DEALER, keys)
    client.connect(endpoint)
    await client.send(b"?")  # type: ignore[misc]
    assert server.poll(SOON_MS)
    client.close(0)
    context.term()


def test_keys_are_the_same_in_every_process_and_differ_by_secret_and_end() -> None:
    """The expected value is HMAC-SHA256 over "corral channel server" and a byte of 1, computed with openssl."""
    keys = ChannelKeys.from_secret(bytes(range(32)))
    assert keys == ChannelKeys.from_secret(bytes(range(32)))
    expected = bytes.fromhex("a166fbb82db8ce4608aa93c9d8a488adb70259f00573b5a39fe0a9f9bb28564d")
    assert keys.server.secret == z85.encode(expected)
    other = ChannelKeys.from_secret(bytes(range(1, 33)))
    pairs = [keys.server, keys.client, other.server, other.client]
    assert len({pair.public for pair in pairs} | {pair.secret for pair in pairs}) == 8
    with pytest.raises(ValueError, match="at least 32 bytes"):
        ChannelKeys.from_secret(b"short")


def test_keys_do_not_print_their_secrets(keys: ChannelKeys, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("corral").info("%r %s", keys, keys)
    assert keys.server.public.decode() in caplog.text
    assert keys.server.secret.decode() not in caplog.text and keys.client.secret.decode() not in caplog.text


def test_a_frame_that_is_too_large_is_not_taken(contexts: list[zmq.Context[Any]]) -> None:
    """A stranger who announces a terabyte costs a connection, not the memory."""
    server, endpoint = serve(contexts[0], None)
    with socket.create_connection((HOST, int(endpoint.rpartition(":")[2]))) as raw:
        raw.sendall(b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32))
        ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
        raw.sendall(b"\x04" + bytes([len(ready)]) + ready)
        raw.sendall(b"\x02" + (MAX_FRAME_BYTES + 1).to_bytes(8, "big"))
        raw.settimeout(5)
        while raw.recv(4096):  # until it hangs up
            pass
    assert not server.poll(0)
