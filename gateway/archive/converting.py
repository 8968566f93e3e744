"""Conversion to another transfer syntax in a worker process: what strangers have sent is decoded nowhere else."""

from gateway.workers.pool import Pool, WorkFailed
from storage.store import Source

CONVERT_S = 60.0
CONVERTED_BYTES_MAX = 256 << 20


class CannotConvert(Exception):
    """It can't be had in that transfer syntax here."""


class Converter:
    def __init__(self) -> None:
        self.pool = Pool(1)  # one object in memory for it

    async def convert(self, source: Source, wanted: str) -> bytes:
        """The data set of a checked copy in transfer syntax `wanted`. Raises CannotConvert."""
        put = source.put
        if put.length > CONVERTED_BYTES_MAX:
            raise CannotConvert(f"{put.length} bytes are too many to be converted")
        try:
            converted: bytes = await self.pool.ask(
                "convert",
                source.file,
                put.offset,
                put.digest,
                put.sop_class,
                put.sop_instance,
                put.transfer_syntax,
                wanted,
                timeout_s=CONVERT_S,
            )
        except WorkFailed as error:
            raise CannotConvert(str(error)) from error
        return converted

    async def stop(self) -> None:
        await self.pool.stop()
