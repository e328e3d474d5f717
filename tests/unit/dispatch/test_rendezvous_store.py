"""The rendezvous store asks nobody who they are, so it listens only where the cluster is."""

import socket
from datetime import timedelta

import psutil
import pytest
from torch.distributed import TCPStore

from actors.dispatch.group import RendezvousStore

NODE = "127.0.0.3"  # of the loopback network, which is all of 127.0.0.0/8


def listening() -> set[tuple[str, int]]:
    connections = psutil.Process().net_connections("tcp")
    return {(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN}


def test_it_listens_on_its_host_alone_and_stops() -> None:
    before, store = listening(), RendezvousStore(NODE)
    store.start()
    host, _, port = store.endpoint.rpartition(":")
    assert listening() - before == {(NODE, int(port))} and host == NODE
    client = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
    client.set("key", "value")
    assert client.get("key") == b"value"
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", int(port)), timeout=5):
        pass
    del client
    store.stop()
    assert listening() == before


def test_starting_and_stopping_leaves_no_file_open() -> None:
    def cycle() -> int:
        store = RendezvousStore(NODE)
        store.start()
        store.stop()
        return psutil.Process().num_fds()

    first = cycle()
    assert [cycle() for _ in range(5)] == [first] * 5
