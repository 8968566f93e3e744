"""What every worker process does: MessagePack in frames, a length of four bytes before each, on standard input and
output. Memory is limited, and the kernel ends it with its parent.
"""

import ctypes
import os
import resource
import signal
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

PR_SET_PDEATHSIG: Final = 1
NICE: Final = 5
READY: Final = b"ready"

Answer = Sequence[Any]


class Pipe:
    """Both directions, as the worker has them."""

    def __init__(self) -> None:
        self._source, self._sink = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)  # what a decoder prints isn't an answer
        self._sink.write(READY)
        self._sink.flush()

    def read(self) -> bytes | None:
        """None when the parent has gone."""
        head = self._source.read(4)
        return self._source.read(int.from_bytes(head, "big")) if head else None

    def write(self, answer: Answer) -> None:
        raw = msgspec.msgpack.encode(answer)
        self._sink.write(len(raw).to_bytes(4, "big"))
        self._sink.write(raw)
        self._sink.flush()

    def ask(self, *question: Any) -> Any:
        """What only the parent can say, in the middle of a job."""
        self.write(["asks", *question])
        raw = self.read()
        if raw is None:
            raise EOFError
        return msgspec.msgpack.decode(raw)


def confine(limit: int, bytes_max: int) -> None:
    """`limit`: RLIMIT_AS, or RLIMIT_DATA for who maps a large file."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(limit, (bytes_max, bytes_max))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(NICE)
    warnings.filterwarnings("ignore")


def serve(pipe: Pipe, do: Callable[[bytes], Answer]) -> None:
    """Until the parent goes."""
    while (job := pipe.read()) is not None:
        pipe.write(do(job))
