"""Tells alerts: to a command, a webhook, by mail. A sink that fails or hangs is logged and hurts nothing else."""

import asyncio
import json
import os
import smtplib
import ssl
import threading
import time
from collections.abc import Awaitable, Callable
from email.message import EmailMessage
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
import structlog
from cryptography import x509

from conf import VERSION
from conf.settings import AlertSettings, Settings
from ha.agent import Agent
from ha.tell.alerts import Alert, Seen, Watch
from storage.control import LINE_BYTES_MAX, StatusReply, StatusRequest, boottime, decode_line, encode_line

log = structlog.get_logger()

LOOK_S: Final = 2.0
SLOW_LOOK_S: Final = 60.0  # quarantine and certificate
STATUS_S: Final = 10.0
SINK_S: Final = 30.0
TRIES: Final = 3
TRY_AGAIN_S: Final = 5.0
WAITING_MAX: Final = 200


class Alerting:
    """Looks every two seconds and tells what is to be told."""

    def __init__(self, settings: Settings, agent: Agent) -> None:
        self._settings, self._agent = settings, agent
        self._watch = Watch(settings.alerts)
        self._sinks = Sinks(settings.node.name, settings.alerts)
        self._started = time.time()
        self._quarantined, self._slow_at = 0, float("-inf")
        self._looking: threading.Thread | None = None
        self._expires: float | None = None

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._sinks.run())
            while True:
                seen = await self._seen()
                for alert in self._watch.look(seen, boottime(), time.time()):
                    log.warning("alert", kind=alert.kind, state=alert.state, text=alert.text)
                    self._sinks.put(alert)
                await asyncio.sleep(LOOK_S)

    async def _seen(self) -> Seen:
        if boottime() - self._slow_at > SLOW_LOOK_S and not (self._looking and self._looking.is_alive()):
            self._slow_at = boottime()
            # Not waited for, and nothing waits for its end: a disk may hang.
            self._looking = threading.Thread(target=self._look_slowly, name="alerts", daemon=True)
            self._looking.start()
        agent = self._agent
        return Seen(
            node=agent.node,
            peer=agent.peer,
            status=await status_of(self._settings.control_socket),
            etcd_ok=agent.etcd_ok,
            maintained=agent.records.maintained,
            quarantined=self._quarantined,
            expires=self._expires,
            started=self._started,
            took_over=agent.took_over,
        )

    def _look_slowly(self) -> None:
        cluster = self._settings.cluster
        if cluster is not None and cluster.tls is not None:
            try:
                certificate = x509.load_pem_x509_certificate(cluster.tls.certificate.read_bytes())
                self._expires = certificate.not_valid_after_utc.timestamp()
            except (OSError, ValueError):
                self._expires = None
        files = 0
        for volume in self._settings.storage.volumes:
            try:
                files += sum(name.endswith(".dcm") for name in os.listdir(volume / "quarantine"))
            except OSError:
                continue  # a disk that is out is told of by itself
        self._quarantined = files


async def status_of(path: Path) -> dict[str, Any] | None:
    """The gateway's status document, None while it doesn't answer."""
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(STATUS_S):
            reader, writer = await asyncio.open_unix_connection(path, limit=LINE_BYTES_MAX)
            writer.write(encode_line(StatusRequest()))
            reply = decode_line(await reader.readline())
            return reply.status if isinstance(reply, StatusReply) else None
    except (OSError, TimeoutError, ValueError, msgspec.DecodeError):
        return None
    finally:
        if writer is not None:
            writer.close()


class Sinks:
    def __init__(self, node: str, settings: AlertSettings) -> None:
        self._node, self._settings = node, settings
        self._waiting: asyncio.Queue[Alert] = asyncio.Queue(WAITING_MAX)

    def put(self, alert: Alert) -> None:
        if self._waiting.full():
            log.error("alert.dropped", kind=self._waiting.get_nowait().kind, why="the sinks don't keep up")
        self._waiting.put_nowait(alert)

    async def run(self) -> None:
        while True:
            alert = await self._waiting.get()
            about = {"product": "Tandem", "version": VERSION, "node": self._node, **_as_dict(alert)}
            settings = self._settings
            await asyncio.gather(
                *([self._tell("command", self._run_command, about)] if settings.command else []),
                *([self._tell("webhook", self._post, about)] if settings.webhook else []),
                *([self._tell("mail", self._mail, about)] if settings.mail_to else []),
            )

    async def _tell(self, sink: str, way: Callable[[dict[str, Any]], Awaitable[None]], about: dict[str, Any]) -> None:
        for number in range(1, TRIES + 1):
            try:
                async with asyncio.timeout(SINK_S):
                    await way(about)
                return
            except (OSError, TimeoutError, aiohttp.ClientError, smtplib.SMTPException, ValueError) as error:
                log.error("alert.not_told", sink=sink, attempt=number, error=str(error) or type(error).__name__)
            await asyncio.sleep(TRY_AGAIN_S)

    async def _run_command(self, about: dict[str, Any]) -> None:
        process = await asyncio.create_subprocess_exec(
            *self._settings.command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL
        )
        try:
            await process.communicate(json.dumps(about).encode())
        except asyncio.CancelledError:
            process.kill()
            raise
        if process.returncode:
            raise OSError(0, f"exit code {process.returncode}")

    async def _post(self, about: dict[str, Any]) -> None:
        async with aiohttp.ClientSession() as session, session.post(self._settings.webhook, json=about) as answer:
            answer.raise_for_status()

    async def _mail(self, about: dict[str, Any]) -> None:
        message = EmailMessage()
        message["From"], message["To"] = self._settings.mail_from, ", ".join(self._settings.mail_to)
        message["Subject"] = f"Tandem {about['node']}: {about['kind']} {about['state']}"
        message.set_content(f"{about['text']}\n\nsince {about['since']}\n")
        await asyncio.to_thread(self._send, message)

    def _send(self, message: EmailMessage) -> None:
        host, _, port = self._settings.smtp.partition(":")
        with smtplib.SMTP(host, int(port or 25), timeout=SINK_S / 2) as server:
            if server.has_extn("starttls"):
                # As mail servers do among themselves: encrypted where offered, whoever signed the certificate.
                context = ssl.create_default_context()
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                server.starttls(context=context)
            server.send_message(message)


def _as_dict(alert: Alert) -> dict[str, Any]:
    since = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(alert.since))
    return {"kind": alert.kind, "state": alert.state, "text": alert.text, "since": since}
