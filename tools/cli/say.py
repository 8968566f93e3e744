"""How a command says what it found: one JSON object, or text for people."""

import json
from collections.abc import Callable
from typing import Any

import click


def say(result: dict[str, Any], as_json: bool, text: str | Callable[[], str]) -> None:
    if as_json:
        click.echo(json.dumps(result))
    else:
        click.echo(text if isinstance(text, str) else text())
