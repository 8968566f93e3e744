"""Settings: what is wrong is said in one line that names file, key and the nearest known key."""

from pathlib import Path

import pytest
from click.testing import CliRunner

import conf
from conf.settings import Settings, SettingsError, load
from tools.cli.main import main

SAMPLE = Path(conf.__file__).parent / "node.toml"


def wrong(tmp_path: Path, text: str, **env: str) -> str:
    path = tmp_path / "node.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load(path, env)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[dicom]\nprot = 104", "dicom.prot: unknown key; did you mean 'port'?"),
        ("[dicmo]\nport = 104", "dicmo: unknown key; did you mean 'dicom'?"),
        ("[dicom]\nport = '104'", "dicom.port: input should be a valid integer, got '104'"),
        ("[dicom]\nport = 70000", "dicom.port: input should be less than or equal to 65535, got 70000"),
        ("[dicom]\naet = 'SEVENTEEN_LETTERS'", "dicom.aet: string should have at most 16 characters"),
        ("[cluster]\naddress = '10.0.0.1'", "cluster.peer: missing"),
        ("[dicom\nport = 104", "not valid TOML"),
    ],
)
def test_one_line_that_helps(tmp_path: Path, text: str, expected: str) -> None:
    message = wrong(tmp_path, text)
    assert expected in message
    assert str(tmp_path / "node.toml") in message


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="can't be read"):
        load(tmp_path / "no.toml", {})


def test_environment_overrides(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text("[dicom]\nport = 104\n")
    settings = load(path, {"TANDEM__DICOM__PORT": "4242", "TANDEM__NODE__NAME": "x", "OTHER": "1"})
    assert settings.dicom.port == 4242
    assert settings.node.name == "x"
    assert "did you mean 'port'" in wrong(tmp_path, "", TANDEM__DICOM__PROT="1")


def test_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().dicom.port = 5  # type: ignore[misc]


def test_check_config_command(tmp_path: Path) -> None:
    good = CliRunner().invoke(main, ["check-config", str(SAMPLE)])
    assert good.exit_code == 0, good.output
    path = tmp_path / "bad.toml"
    path.write_text("[dicom]\nprot = 1\n")
    bad = CliRunner().invoke(main, ["check-config", str(path)])
    assert bad.exit_code == 2
    assert "did you mean 'port'" in bad.output


def test_sample_names_every_key_with_its_default() -> None:
    text = SAMPLE.read_text()
    for section, field in Settings.model_fields.items():
        assert f"[{section}]" in text
        model = field.annotation
        for option in getattr(model, "__args__", (model,)):
            for key in getattr(option, "model_fields", {}):
                assert f"\n{key} = " in text or f"\n# {key} = " in text, f"{section}.{key} isn't in the sample"
