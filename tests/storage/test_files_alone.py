"""Nothing is left of a node but its volumes: what the files and the volumes say of themselves makes it anew."""

import dataclasses
import io
import os
import shutil
from collections.abc import Callable

from pydicom import dcmread

from storage.objects.local_files import DIGEST_ATTRIBUTE
from storage.objects.volume import DELETIONS
from storage.state.description import SIZE, found_in, lineage_of, packed, unpacked, with_description
from storage.state.model import Entry, Put
from tests.builders import item, uid_of
from tests.conftest import Gateway, wait_for
from tests.storage.test_locks import files_of, order, rebuilt

STUDY_TAG = 0x0020_000D


def socket_of(gateway: Gateway) -> object:
    return gateway.folder / "standalone.sock"


def plain(path: os.PathLike[str]) -> None:
    """As tar, cp or another file system leave a file: without attributes, and with the time of now."""
    for name in os.listxattr(path):
        os.removexattr(path, name)
    os.utime(path)


def test_a_file_says_which_entry_it_is(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway()
    small, long = item(), item(PixelData=os.urandom(1 << 20))
    with gateway.client(small, long) as client:
        assert [client.store(small), client.store(long)] == [0, 0]
    assert gateway.status()["instances"] == 2
    gateway.stop()
    said = {}
    for file in files_of(gateway):
        whole = file.read_bytes()
        meta = dcmread(io.BytesIO(whole)).file_meta
        found = found_in(whole[:1024])
        assert found == unpacked(meta.PrivateInformation)
        assert found is not None
        said[file.stem] = (found.epoch, found.seq)
    assert said == {small.sop_instance: (1, 1), long.sop_instance: (1, 2)}


def test_digests_order_and_deletions_are_kept(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway()
    replaced, deleted, rotten = item(PatientName="One"), item(), item()
    again = dataclasses.replace(replaced, data=replaced.data.replace(b"One", b"Two"))
    with gateway.client(replaced) as client:
        assert [client.store(one) for one in (replaced, deleted, rotten)] == [0, 0, 0]
        assert gateway.status()["instances"] == 3
        copies = {file: file.read_bytes() for file in files_of(gateway)}
        assert client.store(again) == 0
    gone = {"study": uid_of(deleted.data, STUDY_TAG), "reason": "test", "by": "test"}
    assert order(socket_of(gateway), "delete", gone) == {"deleted": 1}
    wait_for(lambda: len(gateway.quarantined()) == 2, "what was replaced and deleted to be put aside")
    gateway.stop()
    shutil.rmtree(gateway.folder / "state")
    shutil.rmtree(gateway.volume / "quarantine")
    for file, data in copies.items():  # as a disk that was away brings them back
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.stem != rotten.sop_instance:
            file.write_bytes(data)
    for file in files_of(gateway):
        plain(file)
        if file.stem == rotten.sop_instance:
            raw = bytearray(file.read_bytes())
            raw[-1] ^= 1
            file.write_bytes(raw)
    found = rebuilt(gateway)
    assert (found["instances"], found["deleted"], found["damaged"]) == (1, 1, 1)
    gateway.start()
    with gateway.client(again) as client:
        assert client.store(again) == 0  # it is there, nothing is put aside
        assert client.store(rotten) == 0
    assert gateway.status()["instances"] == 2
    assert not any(file.read_bytes().count(b"One") for file in files_of(gateway) if "~" in file.stem)


def test_a_study_that_was_stored_again_after_its_deletion_is_there(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway()
    one = item()
    study = uid_of(one.data, STUDY_TAG)
    with gateway.client(one) as client:
        assert client.store(one) == 0
        assert order(socket_of(gateway), "delete", {"study": study, "reason": "test", "by": "test"}) == {"deleted": 1}
        wait_for(lambda: len(gateway.quarantined()) == 1, "what was deleted to be put aside")
        assert client.store(one) == 0
    assert gateway.status()["instances"] == 1
    gateway.stop()
    with (gateway.volume / DELETIONS).open("ab") as lines:
        lines.write(b'{"lineage": "torn')  # the power went while a line was written
    shutil.rmtree(gateway.folder / "state")
    for file in files_of(gateway):
        plain(file)
    found = rebuilt(gateway)
    assert (found["instances"], found["deleted"]) == (1, 0)


def test_files_of_older_versions_say_their_digest_in_an_attribute(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway()
    one = item()
    with gateway.client(one) as client:
        assert client.store(one) == 0
    assert gateway.status()["instances"] == 1
    gateway.stop()
    shutil.rmtree(gateway.folder / "state")
    [file] = files_of(gateway)
    whole = bytearray(file.read_bytes())
    said = found_in(bytes(whole[:1024]))
    assert said is not None
    at = whole.index(said.lineage) - 24
    whole[at : at + SIZE] = bytes(SIZE)
    whole[-1] ^= 1
    file.write_bytes(whole)
    os.setxattr(file, DIGEST_ATTRIBUTE, said.digest.hex().encode())
    assert rebuilt(gateway)["damaged"] == 1


def test_what_has_no_room_stays_as_it_is() -> None:
    put = Put("1.2", "1.2", "1.3", "1.4", "1.2.1", bytes(16), 9, 5, {}, "AE", 1.0)
    block = packed(Entry(1, 2, put), "a log")
    assert with_description(b"header", block) == b"header"
    said = unpacked(block)
    assert said is not None
    assert (said.seq, said.lineage) == (2, lineage_of("a log"))
    assert unpacked(block[:-1] + bytes([block[-1] ^ 1])) is None
