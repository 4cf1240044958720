"""Ports that are kept, addresses that differ, names that cannot leave their directory."""

import socket
from pathlib import Path

import pytest

from localcloud.backends.cluster import delete_cluster
from localcloud.backends.instance import allocate_address, delete_instance
from localcloud.backends.ports import choose_port, remembered_ports
from localcloud.backends.registry import delete_repository
from localcloud.backends.supervisor import Supervisor
from localcloud.home import Home, is_free
from localcloud.specs import BackendError


def test_ports_are_chosen_once(tmp_path: Path) -> None:
    first = remembered_ports(tmp_path / "ports.json", "a", "b")
    assert first["a"] != first["b"]
    assert remembered_ports(tmp_path / "ports.json", "b", "a", "c").items() >= first.items()


def test_a_chosen_port_is_free_and_no_ephemeral_one() -> None:
    port = choose_port()
    assert is_free(port)
    assert port < 32768


def test_an_address_is_no_other_instances_and_nobody_serves_there(tmp_path: Path) -> None:
    home = Home(tmp_path)
    first = allocate_address(home, set())
    if first == "127.0.0.1":
        pytest.skip("this system has one loopback address")
    assert allocate_address(home, {first}) not in ("127.0.0.1", first)
    with socket.socket() as agent:
        agent.bind((first, 10250))
        agent.listen()
        assert allocate_address(home, set()) != first
    assert allocate_address(home, set()) == first


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".hidden"])
def test_a_name_cannot_lead_out_of_its_directory(tmp_path: Path, name: str) -> None:
    home = Home(tmp_path / "home")
    with pytest.raises(BackendError):
        delete_instance(home, Supervisor(home), name)
    with pytest.raises(BackendError):
        delete_cluster(home, Supervisor(home), name)


@pytest.mark.parametrize("prefix", ["../x", "", "project", "project/repository/image", "project/.."])
def test_a_repository_is_deleted_by_project_and_name_only(tmp_path: Path, prefix: str) -> None:
    with pytest.raises(BackendError):
        delete_repository(Home(tmp_path), prefix)
