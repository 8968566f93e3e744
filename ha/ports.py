"""What the agent stands on: the gateway of its node, and what makes clients reach it. The simulation has its own."""

from typing import Protocol

from storage.control import Report, Tell


class GatewayLink(Protocol):
    """The gateway on this node: its last report, None while it is away, and a way to tell it its role."""

    @property
    def report(self) -> Report | None: ...

    @property
    def dead(self) -> bool:
        """The process that reported last has ended, for certain."""
        ...

    async def tell(self, tell: Tell) -> None: ...


class Site(Protocol):
    """What makes clients reach this node: addresses, fence, share."""

    @property
    def up(self) -> bool: ...
    @property
    def dark(self) -> bool:
        """Nothing of the primary's addresses answers here, for certain."""
        ...

    @property
    def reads_dark(self) -> bool: ...
    @property
    def reads_wanted(self) -> bool: ...
    @property
    def reads_able(self) -> bool:
        """The addresses for reading can be brought up here, as far as is known."""
        ...

    @property
    def vips(self) -> tuple[str, ...]: ...
    @property
    def share(self) -> bool: ...
    @property
    def trouble(self) -> str:
        """Why this node can't serve well, "" if it can."""
        ...

    @property
    def alarms(self) -> tuple[str, ...]: ...
    @property
    def parts(self) -> dict[str, float]:
        """Seconds that the last taking of the addresses took, by part."""
        ...

    @property
    def following(self) -> bool:
        """Some of what follows the address runs here, or may."""
        ...

    @property
    def follow_stop_s(self) -> float:
        """How long it may take to stop."""
        ...

    @property
    def followed(self) -> dict[str, str]:
        """How each of it is, by name."""
        ...

    def drain(self, wanted: bool) -> None:
        """The address is to leave soon: what follows it is to stop; or it isn't any more. Doesn't wait."""
        ...

    def look_ahead(self) -> None:
        """The primary's addresses may soon be taken here; doesn't wait."""
        ...

    async def serve(self, seconds: float) -> None:
        """Be here, let through by the kernel for `seconds` from now unless refreshed."""
        ...

    async def leave(self) -> None: ...
    async def serve_reads(self, seconds: float) -> None: ...
    async def leave_reads(self) -> None: ...
