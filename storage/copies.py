"""Where this node's copy of an instance lies: published, still in a spool folder, or on its way between the two."""

from collections.abc import Callable
from pathlib import Path

from storage.catalogue import Catalogue
from storage.model import Location, Put
from storage.volumes import Volumes
from storage.workers import Workers


class Copies:
    def __init__(
        self,
        catalogue: Catalogue,
        volumes: Volumes,
        workers: Workers,
        pending: Callable[[str], tuple[Put, Location] | None],
    ) -> None:
        """`pending(sop_instance)` knows those that are in the log and not yet in the catalogue."""
        self._catalogue, self._volumes, self._workers, self._pending = catalogue, volumes, workers, pending

    def find(self, sop_instance: str) -> tuple[str, int] | None:
        """(path, bytes before the data set), None if there is no copy here now."""
        known = self._pending(sop_instance) or self._recorded(sop_instance)
        if known is None:
            return None
        put, location = known
        try:
            volume = self._volumes.get(location.volume)
        except LookupError:
            return None
        study, series = self._catalogue.folders(put, {})
        path = volume.locate(location.spool, location.path or f"{study}/{series}/{sop_instance}.dcm")
        return (str(path), put.offset) if path else None

    def _recorded(self, sop_instance: str) -> tuple[Put, Location] | None:
        location, known = self._catalogue.location(sop_instance), self._catalogue.instance(sop_instance)
        if location is None:
            return None
        if known is not None:
            return known.put, location
        applied = int(self._catalogue.meta("applied", 0))
        for seq in range(self._catalogue.epochs.last[1], applied, -1):
            put = self._catalogue.entry(seq).operation
            if put.sop_instance == sop_instance:
                return put, location
        return None

    async def intact(self, put: Put) -> bool:
        """A copy is there in full length. Saying Success on a mere record would be a lie."""

        def look() -> bool:
            found = self.find(put.sop_instance)
            try:
                return found is not None and Path(found[0]).stat().st_size == put.length
            except OSError:
                return False

        return await self._workers.run(look)
