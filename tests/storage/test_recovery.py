"""Recovery on a real gateway process: killed, cut short, or with its bytes damaged while it was down."""

import signal
from collections.abc import Callable
from pathlib import Path

from storage.catalogue import Catalogue
from storage.recovery import file_digest
from tests.builders import item
from tests.conftest import Gateway, wait_for
from tools.samples import archived


def stored(gateway: Gateway, count: int) -> list[str]:
    items = [item() for _ in range(count)]
    with gateway.client(*items) as client:
        assert all(client.store(one) == 0 for one in items)
    return [one.sop_instance for one in items]


def test_killed_at_once_after_success(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway()
    uids = stored(gateway, 20)
    gateway.stop(signal.SIGKILL)
    gateway.start()
    assert gateway.status()["instances"] == 20
    wait_for(lambda: set(uids) <= set(archived([gateway.volume])), "the files to be published")


def test_tree_renames_that_were_lost_are_done_again(new_gateway: Callable[..., Gateway]) -> None:
    """A power cut may undo renames that were not synced: the file is in the spool again."""
    gateway = new_gateway()
    [uid] = stored(gateway, 1)
    wait_for(lambda: uid in archived([gateway.volume]), "the file")
    gateway.stop(signal.SIGKILL)
    catalogue = Catalogue(gateway.folder / "state" / "catalogue", 1 << 30)
    location = catalogue.location(uid)
    catalogue.close()
    assert location is not None
    path = archived([gateway.volume])[uid]
    path.rename(gateway.volume / "spool" / location.spool)
    gateway.start()
    assert path.exists()


def test_leftovers_in_the_spool_are_removed(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway()
    gateway.stop(signal.SIGKILL)
    (gateway.volume / "spool" / "half").write_bytes(b"half an object")
    gateway.start()
    assert not (gateway.volume / "spool" / "half").exists()


def test_damage_is_noticed(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway()
    [uid] = stored(gateway, 1)
    wait_for(lambda: uid in archived([gateway.volume]), "the file")
    gateway.stop(signal.SIGKILL)
    path = archived([gateway.volume])[uid]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    gateway.start()
    assert "recovery.lost" in gateway.log()
    assert gateway.status()["catch_up"]["missing"] == 1


def test_digest_is_of_the_data_set(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    first.write_bytes(b"header" + b"data")
    second.write_bytes(b"HEADER" + b"data")
    assert file_digest(first, 6) == file_digest(second, 6)
    assert file_digest(first, 6)[1] == 10
