"""What can be used is documented: commands and settings, and the files that ARCHITECTURE.md draws exist."""

import re

import click

from tools.cli.main import main
from tools.dev.conformance import DOCUMENT, TABLES, renewed
from tools.dev.structure import PACKAGES, ROOT

CONTEXT = click.Context(main)
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()


def commands(group: click.Group, prefix: str) -> list[str]:
    found = []
    for name in group.list_commands(CONTEXT):
        command = group.get_command(CONTEXT, name)
        assert command is not None
        if isinstance(command, click.Group):
            found += commands(command, f"{prefix} {name}")
        else:
            found.append(f"{prefix} {name}")
    return found


def test_every_command_is_in_the_readme() -> None:
    missing = [name for name in commands(main, "tandem") if name not in README]
    assert missing == []


def test_every_command_has_help() -> None:
    def check(group: click.Group) -> None:
        for name in group.list_commands(CONTEXT):
            command = group.get_command(CONTEXT, name)
            assert command is not None
            assert command.help
            if isinstance(command, click.Group):
                check(command)

    check(main)


def test_files_that_the_docs_name_exist() -> None:
    named = re.findall(r"`((?:conf|gateway|storage|ha|tools|tests)/[\w./-]+)`", ARCHITECTURE + README)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_architecture_names_every_file() -> None:
    files = [path for package in ("gateway", "storage", "ha") for path in (ROOT / package).rglob("*.py")]
    assert [path.name for path in files if path.name != "__init__.py" and path.name not in ARCHITECTURE] == []


def test_architecture_names_every_room() -> None:
    rooms = {path.parent.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert [str(room) for room in rooms if f"`{room}/`" not in ARCHITECTURE] == []


def test_conformance_statement_is_that_of_the_code() -> None:
    text = DOCUMENT.read_text()
    assert set(re.findall(r"<!-- table: ([a-z-]+) -->", text)) == set(TABLES)
    assert renewed(text) == text, "run `python -m tools.dev.conformance`"
