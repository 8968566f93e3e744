"""What follows the address, with real programs: order, limits, failures, and that nothing is left behind."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conf.mounts import Mount
from conf.settings import FollowSettings, SettingsError, build
from ha.reach.followed import Command
from ha.reach.following import Following
from tests.conftest import wait_for

FILES = Mount(7, "0", "fuse.tandem", True)
New = Callable[..., Following]


def settings(name: str, script: str, **more: Any) -> FollowSettings:
    return FollowSettings(name=name, start=(sys.executable, "-c", script), **{"stop_s": 5.0, **more})


def says(file: Path, word: str, then: str = "time.sleep(1000)") -> str:
    """A program that says when it starts and when it is asked to end."""
    return (
        "import signal, sys, time\n"
        f"def say(word): open({str(file)!r}, 'a').write(word + '\\n')\n"
        f"def end(*_): say('-{word}'); sys.exit()\n"
        f"signal.signal(signal.SIGTERM, end)\nsay('+{word}')\n{then}\n"
    )


def said(file: Path) -> list[str]:
    return file.read_text().split() if file.exists() else []


@pytest.fixture
def new(tmp_path: Path) -> Iterator[New]:
    made: list[Following] = []

    def make(*follow: FollowSettings, files: Callable[[], Mount | None] = lambda: FILES) -> Following:
        mark = f"test-{os.getpid()}-{tmp_path.name}"
        following = Following(follow, lambda one: Command(one, f"{mark}/{one.name}", tmp_path / "output"), files)
        made.append(following)
        return following

    yield make
    for one in made:
        one.want(False, gently=False)
        one.close(30.0)
        assert one.down


def test_they_start_in_their_order_and_stop_in_the_opposite_one(new: New, tmp_path: Path) -> None:
    file = tmp_path / "said"
    following = new(
        settings("one", says(file, "one"), check=("grep", "-q", "one", str(file))), settings("two", says(file, "two"))
    )
    assert following.stop_s == 10.0 and said(file) == []
    following.want(True)
    wait_for(lambda: following.states == {"one": "running", "two": "running"} and len(said(file)) == 2)
    following.want(False)
    wait_for(lambda: following.down)
    assert said(file) == ["+one", "+two", "-two", "-one"]
    assert following.states == {"one": "stopped", "two": "stopped"} and not following.trouble


def test_nothing_to_follow_holds_up_nothing(new: New) -> None:
    following = new()
    following.want(True)
    assert following.down and following.stop_s == 0.0 and following.states == {}


def test_one_that_wont_stop_is_killed_with_all_it_has_started(new: New, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = (
        "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.fork() == 0: os.setsid()\n"
        f"open({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n')\ntime.sleep(1000)\n"
    )
    following = new(settings("stubborn", script, stop_s=0.5))
    following.want(True)
    wait_for(lambda: len(said(pids)) == 2)
    following.want(False)
    wait_for(lambda: following.down)
    for pid in said(pids):
        with contextlib.suppress(FileNotFoundError):
            assert Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"  # of the other's, until somebody waits


def test_who_lost_the_right_to_serve_waits_for_nobody(new: New, tmp_path: Path) -> None:
    file = tmp_path / "said"
    following = new(settings("one", says(file, "one")))
    following.want(True)
    wait_for(lambda: said(file) == ["+one"])
    following.want(False, gently=False)
    wait_for(lambda: following.down)
    assert said(file) == ["+one"]


def test_it_is_started_again_and_too_many_failures_are_trouble(new: New, tmp_path: Path) -> None:
    file = tmp_path / "said"
    following = new(settings("one", says(file, "one", then="sys.exit(1)"), restarts=2))
    following.want(True)
    wait_for(lambda: following.trouble)
    assert said(file) == ["+one"] * 3
    assert following.trouble.startswith("one ") and following.states["one"].startswith("failing: ")


def test_whose_failure_only_alerts_holds_up_no_other(new: New, tmp_path: Path) -> None:
    file = tmp_path / "said"
    following = new(
        settings("one", "import sys; sys.exit(1)", on_failure="alert", restarts=0), settings("two", says(file, "two"))
    )
    following.want(True)
    wait_for(lambda: said(file) == ["+two"])
    wait_for(lambda: following.states["one"].startswith("failing: "))
    assert following.trouble == ""


def test_one_that_isnt_well_is_started_again(new: New, tmp_path: Path) -> None:
    file, ill = tmp_path / "said", tmp_path / "ill"
    check = ("sh", "-c", f"test ! -e {ill}")
    following = new(settings("one", says(file, "one"), check=check, check_every_s=0.1))
    following.want(True)
    wait_for(lambda: following.states == {"one": "running"})
    ill.touch()
    wait_for(lambda: "-one" in said(file))
    ill.unlink()
    wait_for(lambda: said(file)[-1] == "+one" and following.states == {"one": "running"})
    assert not following.trouble


def test_one_that_hands_over_doesnt_wait_for_a_second_failure(new: New, tmp_path: Path) -> None:
    file = tmp_path / "said"
    following = new(settings("one", says(file, "one"), on_failure="hand-over"))
    following.want(True)
    wait_for(lambda: following.states == {"one": "running"} and said(file))
    following._all[0].program.kill()
    wait_for(lambda: following.trouble)


def test_it_waits_for_the_files_and_starts_anew_with_others(new: New, tmp_path: Path) -> None:
    file = tmp_path / "said"
    shown: list[Mount | None] = [None]
    following = new(settings("one", says(file, "one")), files=lambda: shown[0])
    following.want(True)
    shown[0] = Mount(7, "0", "fuse.tandem", False)
    assert said(file) == []
    shown[0] = FILES
    wait_for(lambda: said(file) == ["+one"])
    shown[0] = Mount(8, "0", "fuse.tandem", True)
    wait_for(lambda: said(file) == ["+one", "-one", "+one"])
    assert not following.trouble


def test_a_restarted_agent_finds_what_runs(new: New, tmp_path: Path) -> None:
    file = tmp_path / "said"
    one = settings("one", says(file, "one"))
    first = new(one)
    first.want(True)
    wait_for(lambda: first.states == {"one": "running"} and said(file))
    first._decided = False  # it is gone, and has ended nothing
    second = new(one)
    second.want(True)
    wait_for(lambda: second.states == {"one": "running"})
    assert said(file) == ["+one"]
    second.want(False)
    wait_for(lambda: second.down and said(file) == ["+one", "-one"])


def test_it_isnt_given_what_is_the_agents(new: New, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/somewhere")
    file = tmp_path / "said"
    script = f"import os; open({str(file)!r}, 'w').write(str('NOTIFY_SOCKET' in os.environ))"
    following = new(settings("one", script + "\nimport time; time.sleep(1000)"))
    following.want(True)
    wait_for(lambda: said(file) == ["False"])


def test_one_that_runs_as_another_user_is_stopped_too(new: New, tmp_path: Path) -> None:
    file = tmp_path / "said"
    file.touch()
    file.chmod(0o666)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    script = f"trap 'echo -one >> {file}; exit' TERM; id -un >> {file}; while :; do sleep 0.1; done"
    following = new(FollowSettings(name="one", start=("/bin/sh", "-c", script), user="nobody", stop_s=30.0))
    following.want(True)
    wait_for(lambda: said(file) == ["nobody"])
    following.want(False)
    wait_for(lambda: following.down and said(file) == ["nobody", "-one"])


@pytest.mark.parametrize("fault", ["user", "program", "check"])
def test_what_cant_be_started_is_a_failure_and_no_second_copy(new: New, tmp_path: Path, fault: str) -> None:
    file = tmp_path / "said"
    one = settings("one", says(file, "one"), start_s=1.0, restarts=1)
    changed = {"user": {"user": "nobody-at-all"}, "program": {"start": ("/nonexistent",)}, "check": {"check": ("/no",)}}
    following = new(one.model_copy(update=changed[fault]))
    following.want(True)
    wait_for(lambda: following.trouble)
    assert said(file).count("+one") - said(file).count("-one") <= 1


def test_a_stop_that_hangs_ends_in_a_kill(new: New, tmp_path: Path) -> None:
    file = tmp_path / "said"
    following = new(settings("one", says(file, "one"), stop=("sleep", "1000"), stop_s=0.5))
    following.want(True)
    wait_for(lambda: following.states == {"one": "running"} and said(file))
    following.want(False)
    wait_for(lambda: following.down)
    assert said(file) == ["+one"]


def test_nothing_runs_on_when_the_agent_ends(new: New, tmp_path: Path) -> None:
    """However long its checks take."""
    file = tmp_path / "said"
    following = new(
        settings("one", says(file, "one"), check=("sleep", "2"), check_every_s=0.1),
        settings("two", says(file, "two"), stop=("sleep", "1000")),
    )
    following.want(True)
    wait_for(lambda: following.states == {"one": "running", "two": "running"} and len(said(file)) == 2)
    following.close(1.0)
    wait_for(lambda: not any(one.program.runs for one in following._all), "all to end")


@pytest.mark.parametrize(
    ("follow", "why"),
    [
        ([{"name": "one"}], "either unit or start"),
        ([{"name": "one", "unit": "a.service", "start": ["a"]}], "either unit or start"),
        ([{"name": "one", "unit": "a.service", "user": "x"}], "unit's own"),
        ([{"name": "one", "start": ["a"]}, {"name": "one", "start": ["b"]}], "one name"),
        ([{"name": "One", "start": ["a"]}], "name"),
    ],
)
def test_settings_that_cant_be(follow: list[dict[str, Any]], why: str) -> None:
    cluster = {"address": "10.0.0.1", "peer": "b", "peer_address": "10.0.0.2", "etcd": ["http://x:1"], "follow": follow}
    with pytest.raises(SettingsError, match=why):
        build({"cluster": cluster}, "test")


def test_a_unit_of_systemds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is told, by a `systemctl` that writes it down: none runs here."""
    from ha.reach.followed import Unit

    told = tmp_path / "told"
    script = tmp_path / "systemctl"
    script.write_text(f'#!/bin/sh\necho "$@" >> {told}\ncase "$1" in show) cat {tmp_path}/state;; esac\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    unit = Unit("orthanc.service")
    for state, job, runs in (
        ("inactive", "", False),
        ("failed", "", False),
        ("active", "", True),
        ("activating", "12", True),
        ("inactive", "12", True),  # it waits for another
    ):
        (tmp_path / "state").write_text(f"Job={job}\nActiveState={state}\n")
        assert unit.runs == runs
    told.write_text("")
    unit.start()
    unit.stop()
    unit.kill()
    assert told.read_text().splitlines() == [
        "reset-failed orthanc.service",
        "--no-block start orthanc.service",
        "--no-block stop orthanc.service",
        "kill --kill-who=all --signal=SIGKILL orthanc.service",
        "--no-block stop orthanc.service",
    ]
    script.write_text("#!/bin/sh\necho Unit not found. >&2; exit 5\n")
    with pytest.raises(OSError, match="not found"):
        unit.start()
    with pytest.raises(subprocess.SubprocessError):
        _ = unit.runs
