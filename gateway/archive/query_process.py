"""A query process: finds and encodes, from the catalogue as the gateway has written it.

    python -m gateway.archive.query_process

["begin", number, Asked] and ["more", number] are answered with a Batch, a moment's work each, so that many queries may
be under way; ["end", number] forgets one. An error is ["error", kind, text]: "bad" for an identifier that doesn't fit,
"gone" for a query that this process doesn't know.
"""

import resource
import time
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from pydicom import Dataset

from conf.settings import DicomSettings
from conf.telling import place_of
from gateway.archive.answers import Query
from gateway.archive.asked import USED, Asked, Batch
from gateway.archive.find import Extended, Row
from gateway.dicom.heads import HEAD_BYTES_MAX, HEAD_BYTES_USUAL, chosen, is_whole, read_head
from gateway.dicom.identifiers import BadQuery, decode_identifier, encode_identifier
from gateway.dicom.sop_classes import FIND_MODELS
from gateway.workers.process import Answer, Pipe, confine, serve
from storage.heads import FOLDER, Heads, opened_again
from storage.state.model import Instance
from storage.state.other_process import OtherProcess

MEMORY_BYTES_MAX: Final = 2 << 30  # without what LMDB maps
BATCH: Final = 100
SLICE_S: Final = 0.2  # of one query, before others have their turn and a cancel is looked at


@dataclass
class Running:
    query: Query
    found: Iterator[Row | None]
    transfer_syntax: str


class Searching:
    """All that are under way."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe, self._rows = pipe, OtherProcess()
        self._running: dict[int, Running] = {}
        self._kept: Heads | None = None

    def do(self, job: bytes) -> Answer:
        verb, number, *rest = msgspec.msgpack.decode(job)
        try:
            if verb == "end":
                self._running.pop(number, None)
                return ["ok", None]
            if verb == "begin":
                self._begin(number, msgspec.convert(rest[0], Asked))
            running = self._running.pop(number, None)
            if running is None:
                return ["error", "gone", "the query process was started anew"]
            batch = self._more(running)
            if not batch.ended:
                self._running[number] = running
            return ["ok", batch]
        except BadQuery as error:
            return ["error", "bad", str(error)]
        except MemoryError:
            return ["error", "failed", "it needs too much memory"]
        except EOFError:
            raise
        except Exception as error:  # whatever a strange question leads to; never its text, which may quote it
            return ["error", "failed", place_of(error)]

    def _begin(self, number: int, asked: Asked) -> None:
        self._rows.use(*asked.catalogue)
        settings = DicomSettings.model_validate(dict(zip(USED, asked.settings, strict=True)))
        tags: set[int] = set()
        known = None if asked.unreadable is None else frozenset(asked.unreadable)
        query = Query(
            decode_identifier(asked.identifier, asked.transfer_syntax),
            FIND_MODELS[asked.sop_class],
            settings,
            Extended(*asked.extended),
            self._rows,
            lambda instance: self._head(instance, tags),
            known.__contains__ if known is not None else lambda seq: bool(self._pipe.ask("unreadable", seq, 0)),
        )
        tags.update(int(key.tag) for key in query.from_file)
        if not asked.heads:
            self._no_heads()
        elif tags:
            self._kept = opened_again(self._kept, Path(asked.catalogue[0]).parent / FOLDER)
        self._running[number] = Running(query, query.matches(), asked.transfer_syntax)

    def _more(self, running: Running) -> Batch:
        query, begun = running.query, time.monotonic()
        query.until = begun + SLICE_S
        answers: list[bytes] = []
        odd: list[str] = []
        ended = True
        for row in running.found:
            if row is not None and (answer := encoded(query, row, running.transfer_syntax, odd)) is not None:
                answers.append(answer)
            if len(answers) >= BATCH or time.monotonic() > query.until:
                ended = False
                break
        return Batch(answers, ended, time.monotonic() - begun, bool(query.ignored), odd)

    def _head(self, instance: Instance, tags: Set[int]) -> Dataset | None:
        """Some attributes of a stored instance, from its kept head, or else from its file: the gateway knows where the
        copy is."""
        put = instance.put
        if self._kept is not None:
            try:
                kept = self._kept.get(instance.seq, put)
            except Exception:  # damaged: whoever keeps them will see that, too
                self._no_heads()
                kept = None
            if kept and (found := chosen(kept, put.transfer_syntax, tags)) is not None:
                return found
        for size in (HEAD_BYTES_USUAL, HEAD_BYTES_MAX):
            raw = self._pipe.ask("beginning", instance.seq, size)
            if raw is None:
                return None
            if len(raw) < size or is_whole(raw, put.offset, put.transfer_syntax):
                break
        return read_head(raw, put.offset, put.transfer_syntax)

    def _no_heads(self) -> None:
        if self._kept is not None:
            self._kept.close()
            self._kept = None


def encoded(query: Query, row: Row, transfer_syntax: str, odd: list[str]) -> bytes | None:
    """One stored value that can't be said never ends a query: that answer has its unique keys only, or is left out, and
    `odd` says why."""
    try:
        if (quick := query.encoded(row, transfer_syntax)) is not None:
            return quick
    except Exception as error:
        odd.append(place_of(error))
    answer = query.answer(row)
    for made in (lambda one: one, query.in_utf_8, query.bare):
        try:
            return encode_identifier(made(answer), transfer_syntax)
        except Exception as error:  # pydicom raises whatever a strange value leads it to
            odd.append(place_of(error))
    return None


def main() -> None:
    confine(resource.RLIMIT_DATA, MEMORY_BYTES_MAX)
    pipe = Pipe()
    serve(pipe, Searching(pipe).do)


if __name__ == "__main__":
    main()
