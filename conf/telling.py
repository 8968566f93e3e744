"""What is told in the log: how lines look, and what may be said of an error: its kind and place, never its message,
which may name a patient or a path."""

import logging
import os
import sys
import traceback
from typing import Any

import structlog

from conf.settings import LogSettings


def configure(settings: LogSettings) -> None:
    """One JSON object a line, or text for people, on standard error. Called again, it changes the level."""
    renderer: Any = structlog.processors.JSONRenderer()
    if settings.format == "text":
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[
            _at_least,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    set_level(settings.level)


_least = logging.INFO
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50, "exception": 40}


def set_level(level: str) -> None:
    """The least severe lines shown from now on."""
    global _least
    _least = _LEVELS[level]


def _at_least(_logger: Any, method: str, event: Any) -> Any:
    if _LEVELS.get(method, 50) < _least:
        raise structlog.DropEvent
    return event


def place_of(error: BaseException) -> str:
    """Kind and place of an unforeseen error."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    return type(error).__name__ + where


def reason_of(error: BaseException) -> str:
    """An error in words that name no path: the kernel's for an OSError, else its own."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(error) or type(error).__name__
