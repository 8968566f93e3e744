"""Virtual addresses and the networks between the nodes, seen from outside."""

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from pynetdicom import AE
from pynetdicom.sop_class import Verification

from tests.conftest import wait_for
from tests.system.checkers import Sniffer
from tests.system.conftest import REPLICATION_PORT, heal, other_than, primary_of
from tests.system.test_switchover import tandem
from tests.system.writer import Writer
from tools.lab import network as lab_network
from tools.lab.network import ADDRESSES, READ_VIP, VIP, VIP6, inside, ip, namespace
from tools.lab.pair import AET, DICOM_PORT, Lab

SMB_PORT = 445


def answers(address: str) -> bool:
    """A DICOM echo from the client."""
    with inside("client"):
        entity = AE()
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = entity.connection_timeout = 10
        entity.add_requested_context(Verification)
        association = entity.associate(address, DICOM_PORT, ae_title=AET)
        if not association.is_established:
            return False
        status = association.send_c_echo()
        association.release()
        return bool(status and status.Status == 0)


def here(lab: Lab, node: str) -> set[str]:
    status = lab.node_status(node)
    return {vip.split("/")[0] for vip in status["vips"]} if status else set()


def alarms(lab: Lab, node: str) -> list[str]:
    status = lab.node_status(node)
    return list(status["alarms"]) if status else []


@contextmanager
def rogue(member: str, address: str) -> Iterator[None]:
    """Somebody gives this address to another machine by hand."""
    ip("-n", namespace(member), "addr", "add", f"{address}/24", "dev", "eth0")
    try:
        yield
    finally:
        ip("-n", namespace(member), "addr", "del", f"{address}/24", "dev", "eth0")


def test_the_addresses_are_where_they_should_be(lab: Lab) -> None:
    primary = primary_of(lab)
    standby = other_than(primary)
    wait_for(lambda: here(lab, standby) == {READ_VIP}, "the standby to have the reading address")
    assert here(lab, primary) == {VIP, VIP6}
    assert answers(VIP)
    assert answers(VIP6)
    assert answers(READ_VIP)
    lab.power_off(standby)
    wait_for(lambda: READ_VIP in here(lab, primary), "the primary to have the reading address")
    assert answers(READ_VIP)
    heal(lab)
    wait_for(lambda: here(lab, standby) == {READ_VIP}, "the standby to have it again")
    assert answers(READ_VIP)
    assert here(lab, primary) == {VIP, VIP6}


def test_idle_clients_hear_of_a_takeover(lab: Lab) -> None:
    """DICOM and SMB clients that only wait are reset, and needn't find out by their own patience."""
    primary = primary_of(lab)
    noticed: dict[str, str] = {}

    def wait(name: str, connection: socket.socket) -> None:
        try:
            noticed[name] = "closed" if connection.recv(1) == b"" else "answered"
        except OSError as error:
            noticed[name] = error.strerror or str(error)

    connections = {}
    with inside("client"):
        for name, address, port in (("smb", VIP, SMB_PORT), ("dicom", VIP, DICOM_PORT), ("dicom6", VIP6, DICOM_PORT)):
            connections[name] = socket.create_connection((address, port), 20)
            connections[name].settimeout(100)
    time.sleep(3)  # the list of clients is sent each second; nothing tells from outside when
    waiting = [threading.Thread(target=wait, args=pair) for pair in connections.items()]
    for thread in waiting:
        thread.start()
    lab.power_off(primary)
    for thread in waiting:
        thread.join()
    assert noticed == dict.fromkeys(connections, "Connection reset by peer")
    assert primary_of(lab) == other_than(primary)
    for connection in connections.values():
        connection.close()


def test_an_address_that_somebody_else_has_is_not_taken(lab: Lab) -> None:
    primary = primary_of(lab)
    other = other_than(primary)
    with rogue("w", VIP):
        assert tandem(lab, primary, "switchover")[0] == 0
        wait_for(lambda: VIP6 in here(lab, other), "the other node to serve")
        assert VIP not in here(lab, other)
        wait_for(lambda: any(alarm.startswith(VIP) for alarm in alarms(lab, other)), "an alarm")
    wait_for(lambda: VIP in here(lab, other), "the address to be taken once it is free")
    assert not alarms(lab, other)
    assert answers(VIP)


def test_a_claim_to_an_address_that_is_here_is_seen(lab: Lab) -> None:
    primary = primary_of(lab)
    with rogue("w", VIP), Sniffer() as sniffer:  # its questions are answered by both
        wait_for(lambda: len(set(sniffer.claims[VIP])) == 2, "both to answer")
        wait_for(lambda: any(alarm.startswith(VIP) for alarm in alarms(lab, primary)), "an alarm")
    assert VIP in here(lab, primary)


def test_an_address_given_to_the_standby_by_hand_is_silent_there(lab: Lab) -> None:
    primary = primary_of(lab)
    with rogue(other_than(primary), VIP), Sniffer() as sniffer, Writer(lab) as writer:
        writer.wait_for_more(50)
        time.sleep(2)
    assert len(sniffer.claims[VIP]) == 1
    writer.check()


def test_a_flushed_fence_is_made_again(lab: Lab) -> None:
    """Somebody reloads the machine's firewall: clients notice nothing, and the fence is back."""
    primary = primary_of(lab)
    with Writer(lab) as writer:
        lab_network.nft(primary, "flush ruleset\n")
        writer.wait_for_more(20)
        wait_for(lambda: VIP in _ruleset(primary), "the fence to be there again")
        lab.freeze(primary)  # it does what it is for
        writer.wait_for_more(20)
        lab.thaw(primary)
    heal(lab)
    assert primary_of(lab) == other_than(primary)
    writer.check()


def _ruleset(node: str) -> str:
    argv = ["ip", "netns", "exec", namespace(node), "nft", "list", "ruleset"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("network", ["private", "service"])
def test_one_lost_network_changes_nothing(lab: Lab, network: str) -> None:
    """The pair stays a pair in the same epoch, also where the standby loses etcd with its service network."""
    primary = primary_of(lab)
    standby = other_than(primary)
    before = lab.node_status(primary)
    assert before
    with Writer(lab) as writer:
        lab.cut(standby, network)
        wait_for(lambda: {link["up"] for link in lab.node_status(primary)["links"]} == {True, False}, "one link down")
        writer.wait_for_more(30)
        after = lab.node_status(primary)
        assert after
        assert (after["epoch"], after["in_sync"]) == (before["epoch"], ["a", "b"])
        assert [link["up"] for link in after["links"] if link["used"]] == [True]
        lab.join(standby, network)
        wait_for(lambda: all(link["up"] for link in lab.node_status(primary)["links"]), "both links up")
        writer.wait_for_more(10)
    heal(lab)
    assert primary_of(lab) == primary
    writer.check()


def test_a_stranger_gets_nowhere(lab: Lab) -> None:
    """Without a certificate of the cluster neither replication (on the node that is dialled) nor etcd talks."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for port in (REPLICATION_PORT, 2379, 2380):
        with inside("client"), socket.create_connection((ADDRESSES["b"], port), 20) as plain:
            plain.settimeout(30)
            # Since TLS 1.3 a refused certificate is only noticed by reading.
            with pytest.raises((ssl.SSLError, ConnectionError)), context.wrap_socket(plain) as connection:
                connection.sendall(b"GET /version HTTP/1.0\r\n\r\n")
                if connection.recv(100) == b"":
                    raise ConnectionResetError
    with inside("client"), socket.create_connection((ADDRESSES["b"], REPLICATION_PORT), 20) as plain:
        plain.settimeout(60)
        plain.sendall(b"TD" + bytes(22))
        with pytest.raises(ConnectionError):
            while plain.recv(100):
                pass
            raise ConnectionResetError
    assert lab.in_sync()


def test_certificates_are_renewed_while_the_pair_works(lab: Lab) -> None:
    primary = primary_of(lab)
    with Writer(lab) as writer:
        lab.issue_certificates()
        writer.wait_for_more(10)
        lab.cut(other_than(primary), "private")  # a new connection, with the new certificates
        writer.wait_for_more(20)
    heal(lab)
    writer.check()
    log = (lab.node_dir("b") / "log" / "gateway.log").read_text()
    assert "tls.renewed" in log
