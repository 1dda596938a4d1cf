"""Workers on several nodes connect through the interface that Ray uses, whatever their hosts' names resolve to."""

import os
import socket

import psutil
import pytest
import torch.distributed as dist

from pipelines.training.ray_train import use_interface_of

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.fixture
def environment(monkeypatch):
    """What the variables are: unset at first, and after the test what they were before."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        del os.environ[name]
    return lambda: {name: os.environ[name] for name in VARIABLES if name in os.environ}


def listening() -> set[str]:
    """Addresses at which this process accepts TCP connections."""
    connections = psutil.Process().net_connections("tcp4")
    return {connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN}


# The first address of each interface: gloo takes that one.
@pytest.mark.parametrize(
    ("interface", "address"),
    [
        (name, next(entry.address for entry in entries if entry.family == socket.AF_INET))
        for name, entries in psutil.net_if_addrs().items()
        if any(entry.family == socket.AF_INET for entry in entries)
    ],
)
def test_gloo_listens_at_the_address_that_the_node_has_in_ray(interface, address, environment):
    use_interface_of(address)
    assert environment() == {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
    before = listening()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert listening() - before <= {address}
        assert address in listening()
    finally:
        dist.destroy_process_group()


def test_a_variable_that_the_user_has_set_stays(environment, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "fabric0,fabric1")
    use_interface_of("127.0.0.1")
    assert environment()["GLOO_SOCKET_IFNAME"] == "fabric0,fabric1"
    assert environment()["NCCL_SOCKET_IFNAME"] in ("=lo", "=lo0")


def test_an_address_that_no_interface_has_changes_nothing(environment):
    use_interface_of("203.0.113.7")  # from a range for documentation
    assert environment() == {}
