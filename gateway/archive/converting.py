"""Conversion to another transfer syntax, one object at a time."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from gateway.dicom.transcode import convert


class Converter:
    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "convert")
        self.turn = asyncio.Semaphore(1)  # one object in memory for it

    async def convert(self, data: bytes, sop_class: str, sop_instance: str, stored: str, wanted: str) -> bytes:
        """Raises CannotConvert."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, convert, data, sop_class, sop_instance, stored, wanted)
