"""Golden scenarios: two replication cores, step by step, with all that they say and ask for.

Each file in `scenarios/` has steps, one a line, and under each what came of it, indented. Steps:

    a lead EPOCH MEMBERS        as who won it in etcd              a propose            one more entry, durable at once
    link, unlink                between the two                    a hold, a release    its disk
    at SECONDS                  time goes on, in ticks             a answered           etcd has what it asked for
    a fail                      it loses its memory and starts again; what was durable is there
    a forget SEQ                what entries up to there said may be gone
    a refuses                   it can't take the other one's state from here on
    deliver                     all that is on its way; `lose` throws it away

`UPDATE_SCENARIOS=1` writes what comes of the steps now into the files; read the difference before you believe it.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from storage.replication.effects import Adopt, DropLink, Effect, Limits, Persist, Publish, Send, SteppedDown, Transmit
from storage.replication.epochs import Epochs
from storage.replication.messages import Ack, AnyMessage, Hello, Joined, Ping, Pong, Prepare, Welcome
from storage.replication.replica import Replica

FOLDER = Path(__file__).with_name("scenarios")
LIMITS = Limits(state_after=5)


class Side:
    def __init__(self, scene: "Scene", name: str, peer: str) -> None:
        self.scene, self.name, self.peer = scene, name, peer
        self.log: list[int] = []  # the epoch of each durable entry
        self.owed: set[int] = set()  # entries without their bytes
        self.refuses = False
        self.promised = self.applied = self.incarnation = 0
        self.held: list[Persist] | None = None
        self.start()

    def start(self) -> None:
        self.incarnation += 1
        epochs = Epochs()
        for seq, epoch in enumerate(self.log, 1):
            epochs.append(epoch, seq)
        facts = (f"store-{self.name}", self.incarnation, self.promised, epochs, len(self.log), self.applied)
        self.core = Replica(self.name, self.peer, "c", *facts, limits=LIMITS)
        self.memory: dict[int, int] = {}

    def carry_out(self) -> None:
        while effects := self.core.take():
            for effect in effects:
                self._do(effect)

    def _do(self, effect: Effect) -> None:
        said = self.scene.say
        match effect:
            case Send(message):
                self.scene.send(self.name, message)
            case Transmit(session, first, last, commit):
                for seq in range(first, last + 1):
                    epoch = self.memory.get(seq) or self.log[seq - 1]
                    self.scene.send(self.name, Prepare(self.core.epoch, session, seq, epoch, commit, b"", 0))
            case Persist(seq, epoch):
                said(f"{self.name} keeps {epoch}.{seq}" + (", bytes later" if effect.owed else ""))
                if self.held is None:
                    self._keep(effect)
                else:
                    self.held.append(effect)
            case Adopt():
                self._adopt(effect)
            case Publish(seq):
                self.applied = seq
                said(f"{self.name} publishes up to {seq}")
            case SteppedDown():
                said(f"{self.name} leads no longer")
            case DropLink(reason):
                said(f"{self.name} ends the link: {reason}")

    def _keep(self, effect: Persist) -> None:
        self.log.append(effect.entry_epoch)
        self.owed |= {effect.seq} if effect.owed else set()
        self.core.persisted(effect.seq)

    def release(self) -> None:
        held, self.held = self.held or [], None
        for effect in held:
            self._keep(effect)

    def _adopt(self, effect: Adopt) -> None:
        self.promised = effect.epoch
        dropped = len(self.log) - effect.match
        self.scene.say(
            f"{self.name} follows epoch {effect.epoch} from {effect.match}" + f", drops {dropped}" * bool(dropped)
        )
        del self.log[effect.match :]
        state = None
        if effect.state and self.refuses:
            self.scene.say(f"{self.name} can't take the state")
        elif effect.state:
            leader = self.scene.sides[self.peer]
            self.log = leader.log[: leader.applied]
            self.applied = len(self.log)
            self.owed |= set(range(effect.match + 1, self.applied + 1))
            epochs = Epochs()
            for seq, epoch in enumerate(self.log, 1):
                epochs.append(epoch, seq)
            state = tuple(epochs.pairs)
            self.scene.say(f"{self.name} takes the state up to {self.applied}")
        self.core.adopted(effect.epoch, effect.match, state)

    def propose(self) -> None:
        seq = self.core.propose(self.scene.now)
        self.memory[seq] = self.core.epoch
        self._do(Persist(seq, self.core.epoch, b"", 0))

    def standing(self) -> str:
        core = self.core
        log = "".join(f"{epoch}" for epoch in self.log) or "-"
        role = f"leads in {core.epoch}" if core.leading else "follows" if core.joined else "waits"
        sets = f", commits wait for {'+'.join(sorted(core.in_sync.required))}" if core.leading else ""
        asks = f", asks for {'+'.join(sorted(core.in_sync.ask.members))}" if core.in_sync.ask else ""
        lacks = f", the other lacks {core.peer_lacks}" if core.leading and core.peer_lacks else ""
        return f"{self.name}: log {log}, committed {core.commit}, {role}{sets}{asks}{lacks}"


class Scene:
    def __init__(self) -> None:
        self.now = 0.0
        self.out: list[str] = []
        self.linked = False
        self.under_way: list[tuple[str, AnyMessage]] = []
        self.sides = {"a": Side(self, "a", "b"), "b": Side(self, "b", "a")}

    def say(self, text: str) -> None:
        self.out.append(f"    {text}")

    def send(self, sender: str, message: AnyMessage) -> None:
        if self.linked:
            self.under_way.append((sender, message))

    def step(self, line: str) -> list[str]:
        self.out = []
        before = [side.standing() for side in self.sides.values()]
        match line.split():
            case ["link"]:
                self.linked = True
                for side in self.sides.values():
                    side.core.linked_up(self.now)
            case ["unlink"]:
                self.linked, self.under_way = False, []
                for side in self.sides.values():
                    side.core.unlinked(self.now)
            case ["deliver"]:
                self._deliver()
            case ["lose"]:
                self.under_way = []
            case ["at", until]:
                while self.now < float(until):
                    self.now = min(self.now + 0.2, float(until))
                    for side in self.sides.values():
                        side.core.missing, side.core.counted = len(side.owed), len(side.log)
                        side.core.tick(self.now)
                        side.carry_out()
                    self._deliver()
            case [name, *words]:
                self._side(self.sides[name], words)
        for side in self.sides.values():
            side.carry_out()
        after = [side.standing() for side in self.sides.values()]
        return [*self.out, *(f"    {now}" for now, then in zip(after, before, strict=True) if now != then)]

    def _side(self, side: Side, words: list[str]) -> None:
        match words:
            case ["lead", epoch, members]:
                side.promised = int(epoch)
                side.core.promise(int(epoch))
                side.core.lead(int(epoch), frozenset(members), self.now)
            case ["propose"]:
                side.propose()
            case ["hold"]:
                side.held = []
            case ["refuses"]:
                side.refuses = True
            case ["forget", upto]:
                side.core.forget(int(upto), self.now)
            case ["release"]:
                side.release()
            case ["answered"]:
                assert side.core.in_sync.ask, "nothing was asked for"
                side.core.answered(side.core.in_sync.ask.token)
            case ["fail"]:
                self.linked, self.under_way, side.held = False, [], None
                side.start()
                self.sides[side.peer].core.unlinked(self.now)
            case _:
                raise ValueError(f"no step: {side.name} {' '.join(words)}")

    def _deliver(self) -> None:
        while self.under_way:
            sender, message = self.under_way.pop(0)
            if (told := _told(message)) is not None:
                self.say(f"{sender} -> {self.sides[sender].peer}: {told}")
            receiver = self.sides[self.sides[sender].peer]
            receiver.core.receive(message, self.now)
            receiver.carry_out()
            self.sides[sender].carry_out()


def _told(message: AnyMessage) -> str | None:
    """What matters of a message; None for heartbeats, which come all the time."""
    facts: dict[str, Any]
    match message:
        case Ping() | Pong():
            return None
        case Hello():
            facts = {"leads": message.promised} if message.leading else {"log": message.epochs, "whole": message.whole}
        case Welcome():
            state = "must" if message.must else "may" if message.state else "no"
            facts = {"epoch": message.epoch, "match": message.match, "state": state}
        case Joined() | Ack():
            facts = {"seq": message.seq}
        case Prepare():
            facts = {"entry": f"{message.entry_epoch}.{message.seq}", "committed": message.commit}
        case _:
            facts = {}
    return " ".join([type(message).__name__, *(f"{name}={value}" for name, value in facts.items())])


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    expected = path.read_text().splitlines()
    scene, found = Scene(), list[str]()
    for line in expected:
        if line.startswith("#") or not line.strip():
            found.append(line)
        elif not line.startswith(" "):
            found += [line, *scene.step(line)]
    if os.environ.get("UPDATE_SCENARIOS"):
        path.write_text("\n".join(found) + "\n")
    assert found == expected
