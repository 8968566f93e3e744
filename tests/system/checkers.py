"""Looking at the pair from the outside while faults happen: who answers for an address, and what readers see."""

import ipaddress
import threading
import time
from contextlib import ExitStack
from itertools import pairwise
from types import TracebackType

from pydicom import Dataset
from pynetdicom import AE
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind
from pyroute2 import IPRoute

from ha.reach.neighbours import Interface, Listener, ask
from tests.system.writer import Writer
from tools.lab.network import READ_VIP, VIP, inside
from tools.lab.pair import AET, DICOM_PORT, Lab

ASK_INTERVAL_S = 0.1


class _Thread:
    """Works in the client's network until it is stopped; what goes wrong in it is raised then."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(120)
        if self._error:
            raise self._error

    def _run(self) -> None:
        try:
            with inside("client"):
                self.work()
        except BaseException as error:
            self._error = error

    def work(self) -> None:
        raise NotImplementedError


def own_interface() -> Interface:
    with IPRoute() as route:
        link = route.get_links(route.link_lookup(ifname="eth0")[0])[0]
    return Interface(link["index"], "eth0", bytes.fromhex(link.get_attr("IFLA_ADDRESS").replace(":", "")))


class Sniffer(_Thread):
    """Asks again and again who has the virtual addresses, and notes each MAC that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.claims: dict[str, list[bytes]] = {VIP: [], READ_VIP: []}  # in their order, repetitions left out

    def work(self) -> None:
        listener = Listener()
        here = own_interface()
        try:
            while not self._stop.is_set():
                for address in self.claims:
                    ask(here, ipaddress.ip_address(address))
                time.sleep(ASK_INTERVAL_S)
                for address, claimed in listener.claims():
                    seen = self.claims.get(str(address))
                    if seen is not None and seen[-1:] != [claimed]:
                        seen.append(claimed)
        finally:
            listener.close()

    def moves(self, address: str = VIP) -> int:
        """How often the address changed its place. More than there were takeovers: two nodes answered in turn."""
        return max(0, len(self.claims[address]) - 1)


class Reader(_Thread):
    """Asks for all images of a writer at the virtual address. What was acknowledged before it asked must be there, and
    what was there once stays."""

    def __init__(self, writer: Writer) -> None:
        super().__init__()
        self._writer = writer
        self.answers = 0
        self.stale: list[str] = []

    def work(self) -> None:
        entity = AE()
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = entity.connection_timeout = 4
        entity.add_requested_context(StudyRootQueryRetrieveInformationModelFind)
        seen: set[str] = set()
        while not self._stop.is_set():
            time.sleep(0.2)
            association = entity.associate(VIP, DICOM_PORT, ae_title=AET)
            if not association.is_established:
                continue
            while not self._stop.is_set():
                acknowledged = set(self._writer.acknowledged)
                found = self._ask(association)
                if found is None:
                    break
                self.answers += 1
                self.stale += sorted((acknowledged | seen) - found)[:5]
                seen |= found
                time.sleep(0.2)
            association.abort()

    def _ask(self, association) -> set[str] | None:
        """None if the answer didn't come whole."""
        wanted = Dataset()
        wanted.QueryRetrieveLevel, wanted.SOPInstanceUID = "IMAGE", ""
        wanted.StudyInstanceUID, wanted.SeriesInstanceUID = self._writer.study, self._writer.series
        found: set[str] = set()
        try:
            for status, identifier in association.send_c_find(wanted, StudyRootQueryRetrieveInformationModelFind):
                if status and status.Status == 0xFF00:
                    found.add(str(identifier.SOPInstanceUID))
                elif status and status.Status == 0:
                    return found
        except (RuntimeError, OSError):
            return None
        return None


class Watched:
    """A writer, a reader and a sniffer around a fault."""

    def __init__(self, lab: Lab) -> None:
        self.writer = Writer(lab)
        self.reader, self.sniffer = Reader(self.writer), Sniffer()
        self._stack = ExitStack()

    def __enter__(self) -> "Watched":
        self._stack.enter_context(self.sniffer)
        self._stack.enter_context(self.writer)
        self._stack.enter_context(self.reader)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def wait_for_more(self, number: int) -> None:
        self.writer.wait_for_more(number)

    def check(self, takeovers: int) -> None:
        """After the pair has healed. `takeovers`: how often at most the address may have moved meanwhile."""
        self.writer.check()
        assert self.reader.answers > 0
        assert not self.reader.stale, f"acknowledged, or seen before, and not found: {self.reader.stale[:5]}"
        claims = self.sniffer.claims[VIP]
        assert claims, "nobody answered for the address"
        assert self.sniffer.moves() <= takeovers, [mac.hex(":") for mac in claims]
        assert all(before != after for before, after in pairwise(claims))
