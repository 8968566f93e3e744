"""What is told to people, when, and by which ways."""

import asyncio
import json
from pathlib import Path
from typing import Any

from aiohttp import web

from conf.settings import AlertSettings
from ha.tell.alerts import Alert, Seen, Watch
from ha.tell.sinks import Sinks
from tests.conftest import free_port

WALL = 1_800_000_000.0


def status(**changed: Any) -> dict[str, Any]:
    volume = {"path": "/d1", "state": "online", "total": 100, "free": 50}
    usual: dict[str, Any] = {
        "mode": "PAIR",
        "role": "primary",
        "primary": "a",
        "in_sync": ["a", "b"],
        "single_copy": 0,
        "trouble": "",
        "alarms": [],
        "links": [{"route": "x - y", "up": True, "used": True}],
        "healing": {"unreadable": 0},
        "scrub": {"bad": 0},
        "heard": {},
        "nodes": {"a": {"volumes": [volume]}},
    }
    return usual | changed


def seen(**changed: Any) -> Seen:
    usual: dict[str, Any] = {
        "node": "a",
        "peer": "b",
        "status": status(),
        "etcd_ok": True,
        "maintained": {},
        "quarantined": 0,
        "expires": None,
        "started": WALL,
    }
    return Seen(**(usual | changed))


def told(watch: Watch, what: Seen, now: float) -> list[tuple[str, str]]:
    return [(alert.kind, alert.state) for alert in watch.look(what, now, WALL + now)]


def test_a_condition_is_told_when_it_lasts_and_when_it_is_over() -> None:
    watch = Watch(AlertSettings(settle_s=10.0, again_s=100.0))
    alone = seen(status=status(mode="SOLO", single_copy=3))
    assert told(watch, seen(), 0) == []
    assert told(watch, alone, 1) == []
    assert told(watch, seen(), 5) == []  # it was short
    assert told(watch, alone, 6) == []
    assert told(watch, alone, 16) == [("solo", "begins")]
    assert told(watch, alone, 50) == []
    assert told(watch, alone, 117) == [("solo", "lasts")]
    assert told(watch, seen(), 120) == []
    assert told(watch, alone, 125) == []  # not over after all
    assert told(watch, seen(), 130) == []
    assert told(watch, seen(), 141) == [("in sync again", "over")]
    assert told(watch, seen(), 500) == []


def test_each_kind() -> None:
    dead = {"path": "/d1", "state": "failed: Input/output error"}
    full = {"path": "/d1", "state": "full", "total": 100, "free": 5}
    links = [{"route": "x", "up": True, "used": True}, {"route": "y", "up": False, "used": False}]
    for kind, what in {
        "disk out": seen(status=status(nodes={"a": {"volumes": [dead]}})),
        "low space": seen(status=status(nodes={"a": {"volumes": [full]}})),
        "no quorum": seen(etcd_ok=False),
        "gateway away": seen(status=None),
        "quarantine grows": seen(quarantined=5000),
        "certificate ends": seen(expires=WALL + 86400),
        "trouble": seen(status=status(trouble="smbd doesn't stay up")),
        "address": seen(status=status(alarms=["10.0.0.5 is also claimed by aa:bb"])),
        "link down": seen(status=status(links=links)),
        "follower fails": seen(status=status(follow={"pacs": "failing: has ended", "other": "running"})),
        "unreadable": seen(status=status(healing={"unreadable": 2})),
    }.items():
        watch = Watch(AlertSettings(settle_s=1.0))
        watch.look(what, 0, WALL)
        assert told(watch, what, 2) == [(kind, "begins")], kind


def test_events_are_told_once() -> None:
    watch = Watch(AlertSettings())
    assert told(watch, seen(status=status(primary="b", role="standby")), 0) == []
    assert told(watch, seen(status=status(primary="")), 1) == []
    assert told(watch, seen(), 2) == [("failover", "event")]
    assert told(watch, seen(), 3) == []
    assert told(watch, seen(status=status(scrub={"bad": 2})), 4) == [("scrub repair", "event")]
    assert told(watch, seen(status=status(scrub={"bad": 2})), 5) == []
    assert told(watch, seen(status=status(primary="b", role="standby")), 6) == []  # node b tells of that


def test_a_modality_that_falls_silent() -> None:
    watch = Watch(AlertSettings(settle_s=1.0, silent_s={"CT1": 100.0}))
    heard = status(heard={"CT1": WALL + 50})
    assert told(watch, seen(status=heard), 99) == []
    assert told(watch, seen(status=heard), 149) == []
    assert told(watch, seen(status=heard), 151) == []
    assert told(watch, seen(status=heard), 153) == [("silent modality", "begins")]
    assert told(watch, seen(status=status(heard={"CT1": WALL + 154})), 155) == []
    assert told(watch, seen(status=status(heard={"CT1": WALL + 154})), 157) == [("silent modality", "over")]


def test_a_node_under_maintenance_tells_nothing_and_nobody_tells_of_it() -> None:
    broken = {"trouble": "smbd doesn't stay up", "mode": "RECOVERING", "role": "standby"}
    alone = {"mode": "SOLO", "in_sync": ["a"]}
    cut = {"links": [{"route": "one", "up": False}, {"route": "two", "up": True}]}
    for maintained, what in (("a", broken), ("b", alone), ("b", cut)):
        watch = Watch(AlertSettings(settle_s=1.0))
        working = seen(status=status(**what), maintained={maintained: WALL})
        watch.look(working, 0, WALL)
        assert told(watch, working, 10) == []


def test_the_switchover_to_maintenance_is_no_failover() -> None:
    watch = Watch(AlertSettings())
    watch.look(seen(status=status(primary="b", role="standby")), 0, WALL)
    assert told(watch, seen(maintained={"b": WALL}), 1) == []


def test_a_real_failover_under_maintenance_is_told() -> None:
    """The node that was worked on had to take over meanwhile; then it died, and this one takes over from it."""
    watch = Watch(AlertSettings(settle_s=1.0))
    watch.look(seen(status=status(primary="b", role="standby"), maintained={"b": WALL}), 10, WALL + 10)
    alone = status(mode="SOLO", in_sync=["a"])
    after = seen(status=alone, maintained={"b": WALL}, took_over=WALL + 11)
    assert told(watch, after, 11) == [("failover", "event")]
    assert told(watch, after, 13) == [("solo", "begins")]


def test_a_node_under_maintenance_that_has_to_serve_says_so() -> None:
    watch = Watch(AlertSettings(settle_s=1.0))
    watch.look(seen(), 0, WALL)
    working = {"a": WALL + 1}
    assert told(watch, seen(status=status(primary="b", role="standby"), maintained=working), 2) == []
    assert told(watch, seen(maintained=working, took_over=WALL + 3), 3) == [("failover", "event")]


def test_maintenance_is_not_the_end_of_a_lost_link() -> None:
    watch = Watch(AlertSettings(settle_s=1.0))
    cut = status(links=[{"route": "one", "up": False}, {"route": "two", "up": True}])
    watch.look(seen(status=cut), 0, WALL)
    assert told(watch, seen(status=cut), 2) == [("link down", "begins")]
    for now in (3, 5, 7):
        assert told(watch, seen(status=cut, maintained={"b": WALL}), now) == []


def test_maintenance_hides_nothing_of_the_node_that_serves_and_isnt_forgotten() -> None:
    watch = Watch(AlertSettings(settle_s=1.0))
    serving = seen(status=status(mode="SOLO", in_sync=["a"]), maintained={"a": WALL})
    watch.look(serving, 0, WALL)
    assert told(watch, serving, 10) == [("solo", "begins")]
    standby = seen(status=status(role="standby", primary="b"), maintained={"a": WALL})
    watch = Watch(AlertSettings(settle_s=1.0))
    watch.look(standby, 9 * 3600, WALL + 9 * 3600)
    assert told(watch, standby, 9 * 3600 + 5) == [("maintenance", "begins")]


def test_what_cant_be_seen_isnt_over() -> None:
    watch = Watch(AlertSettings(settle_s=1.0))
    dead = {"path": "/d1", "state": "failed: Input/output error"}
    alone = seen(status=status(mode="SOLO", in_sync=["a"], nodes={"a": {"volumes": [dead]}}))
    watch.look(alone, 0, WALL)
    assert sorted(told(watch, alone, 2)) == [("disk out", "begins"), ("solo", "begins")]
    away = seen(status=None)
    watch.look(away, 3, WALL)
    assert told(watch, away, 60) == [("gateway away", "begins")]
    back = seen(status=status(mode="HELD", in_sync=["a"], nodes={"a": {"volumes": [dead]}}))
    watch.look(back, 61, WALL)
    assert told(watch, back, 70) == [("gateway away", "over")]
    watch.look(seen(), 71, WALL)
    assert sorted(told(watch, seen(), 80)) == [("disk out", "over"), ("in sync again", "over")]


async def test_sinks_tell_and_a_failing_one_hurts_nothing(tmp_path: Path) -> None:
    """A real command, a real web server, a mail server that speaks enough SMTP, and a command that fails."""
    posted: list[dict[str, Any]] = []
    mails: list[bytes] = []

    async def hook(request: web.Request) -> web.Response:
        posted.append(await request.json())
        return web.Response()

    async def smtp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 test\r\n")
        while line := await reader.readline():
            if line.upper().startswith(b"DATA"):
                writer.write(b"354 go on\r\n")
                mails.append(await reader.readuntil(b"\r\n.\r\n"))
            writer.write(b"221 bye\r\n" if line.upper().startswith(b"QUIT") else b"250 ok\r\n")
            if line.upper().startswith(b"QUIT"):
                writer.close()
                return

    web_port, mail_port = free_port(), free_port()
    app = web.Application()
    app.router.add_post("/alerts", hook)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", web_port).start()
    mail_server = await asyncio.start_server(smtp, "127.0.0.1", mail_port)
    log = tmp_path / "alerts"
    ways = {"webhook": f"http://127.0.0.1:{web_port}/alerts", "mail_to": ("ops@example.org",)}
    good = Sinks("a", AlertSettings(command=("sh", "-c", f"cat >> {log}"), smtp=f"127.0.0.1:{mail_port}", **ways))
    bad = Sinks("a", AlertSettings(command=("sh", "-c", "exit 3"), webhook=f"http://127.0.0.1:{free_port()}/"))
    alert = Alert("solo", "node a works alone", "begins", WALL)
    running = [asyncio.create_task(sinks.run()) for sinks in (good, bad)]
    try:
        for sinks in (good, bad):
            sinks.put(alert)
        async with asyncio.timeout(60):
            while not (posted and mails and log.exists() and log.read_text()):
                await asyncio.sleep(0.05)
        for number in range(1000):  # more than wait: the oldest are dropped, nothing raises
            bad.put(Alert("solo", str(number), "lasts", WALL))
        assert not any(task.done() for task in running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        mail_server.close()
        await runner.cleanup()
    assert json.loads(log.read_text())["text"] == "node a works alone"
    assert (posted[0]["kind"], posted[0]["node"]) == ("solo", "a")
    assert b"Subject: Tandem a: solo begins" in mails[0]
