"""A worker process: reads jobs from standard input, answers on standard output, one at a time.

    python -m gateway.workers.worker

A job is a length of four bytes and MessagePack [name, arguments]; the answer likewise ["ok", result] or
["error", kind, text]. Memory is limited, and the kernel ends this process with its parent.
"""

import ctypes
import os
import resource
import signal
import warnings
from collections.abc import Callable
from io import BytesIO
from typing import Any, BinaryIO, Final

import msgspec
import xxhash

from gateway.dicom.identify import Unreadable, identify
from gateway.dicom.transcode import CannotConvert, convert

MEMORY_BYTES_MAX: Final = 4 << 30
PR_SET_PDEATHSIG: Final = 1
NICE: Final = 5


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
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(NICE)
    warnings.filterwarnings("ignore")
    source, sink = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a decoder prints isn't an answer
    sink.write(b"ready")
    sink.flush()
    while head := source.read(4):
        raw = msgspec.msgpack.encode(_answer(source.read(int.from_bytes(head, "big"))))
        sink.write(len(raw).to_bytes(4, "big"))
        sink.write(raw)
        sink.flush()


if __name__ == "__main__":
    main()
