"""A worker process: reads jobs from standard input, answers on standard output, one at a time.

    python -m gateway.workers.worker

A job is [name, arguments]; the answer ["ok", result] or ["error", kind, text].
"""

import resource
from collections.abc import Callable
from io import BytesIO
from typing import Any, BinaryIO, Final

import msgspec
import xxhash

from gateway.dicom.identify import Unreadable, identify
from gateway.dicom.transcode import CannotConvert, convert
from gateway.workers.process import Pipe, confine, serve

MEMORY_BYTES_MAX: Final = 4 << 30


class Bad(Exception):
    """The input isn't what the caller said it is."""


def _opened(source: bytes | tuple[str, int] | list[Any]) -> BinaryIO:
    """Bytes, or (path, where the data set begins)."""
    if isinstance(source, bytes):
        return BytesIO(source)
    path, offset = source
    file = open(path, "rb")  # noqa: SIM115 - closed by who asked
    file.seek(offset)
    return file


def do_identify(source: Any, transfer_syntax: str, default_set: str) -> Any:
    with _opened(source) as file:
        found = identify(file, transfer_syntax, default_set)
    return [found.sop_class, found.sop_instance, found.study, found.series, found.keys]


def do_convert(
    path: str, offset: int, digest: bytes, sop_class: str, sop_instance: str, stored: str, wanted: str
) -> bytes:
    with _opened((path, offset)) as file:
        data = file.read()
    if xxhash.xxh3_128_digest(data) != digest:
        raise Bad("the copy isn't what was stored")
    return convert(data, sop_class, sop_instance, stored, wanted)


JOBS: Final[dict[str, Callable[..., Any]]] = {"identify": do_identify, "convert": do_convert}


def _answer(job: bytes) -> list[Any]:
    name, arguments = msgspec.msgpack.decode(job)
    try:
        return ["ok", JOBS[name](*arguments)]
    except Unreadable as error:
        return ["error", "unreadable", str(error)]
    except (CannotConvert, Bad) as error:
        return ["error", "cannot", str(error)]
    except MemoryError:
        return ["error", "failed", "it needs too much memory"]
    except Exception as error:  # whatever strange data lead a parser to: never its text, which may quote them
        return ["error", "failed", type(error).__name__]


def main() -> None:
    confine(resource.RLIMIT_AS, MEMORY_BYTES_MAX)
    serve(Pipe(), _answer)


if __name__ == "__main__":
    main()
