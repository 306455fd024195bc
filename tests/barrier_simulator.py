"""Runs warps that meet at barriers in a random order, and looks at what each finds in memory when it reads.

A warp is a list of events, recorded beforehand by `Recorder`; nothing is computed. A barrier is an `mbarrier` of the
PTX ISA: it counts arrivals down, and a wait sees the parity of its phase alone.
"""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Hashable
from typing import Any

Place = tuple[Hashable, ...]
"""Names a slot of memory, or a barrier."""


@dataclasses.dataclass
class Event:
    """One step of a warp.

    Attributes:
        kind: `wait`, `arrive`, `write`, `copy` (a write that ends later, and then arrives) or `read`.
        places: The barrier, or the slots of memory.
        number: Of a wait: phases of the barrier that ended before the one it is for. Of an arrival: how many.
        content: Of a write or a copy: what is there then. Of a read: what should be there.
        barrier: Of a copy: where it arrives.
    """

    kind: str
    places: tuple[Place, ...]
    number: int = 1
    content: Any = None
    barrier: Place | None = None


class Recorder:
    """The events of one warp, or of a warpgroup that acts as one."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.waits: collections.Counter[Place] = collections.Counter()

    def wait(self, barrier: Place, number: int | None = None) -> None:
        """Wait for the next phase that this warp has not waited for, or for the one that `number` others precede."""
        if number is None:
            number = self.waits[barrier]
            self.waits[barrier] += 1
        self.events.append(Event("wait", (barrier,), number))

    def arrive(self, barrier: Place, number: int = 1) -> None:
        self.events.append(Event("arrive", (barrier,), number))

    def write(self, place: Place, content: Any) -> None:
        self.events.append(Event("write", (place,), content=content))

    def copy(self, places: tuple[Place, ...], content: Any, barrier: Place) -> None:
        self.events.append(Event("copy", places, content=content, barrier=barrier))

    def read(self, place: Place, content: Any) -> None:
        self.events.append(Event("read", (place,), content=content))


def simulate(warps: dict[str, list[Event]], arrivals: dict[Place, int], seed: int) -> dict[Place, int]:
    """Run the warps to their ends.

    Args:
        warps: Events by name.
        arrivals: How many end a phase, of each barrier.
        seed: Of the order in which warps go on and copies end, and of how fast each is.

    Returns:
        How many phases of each barrier ended. No phase is left open.

    Raises:
        AssertionError: A warp reads something else than it should, nobody can go on, a wait lasts until the parity
            says the opposite, or a phase is left open.
    """
    rng = random.Random(seed)
    missing, phases = dict(arrivals), dict.fromkeys(arrivals, 0)
    memory: dict[Place, Any] = {}
    next_event = dict.fromkeys(warps, 0)
    speeds = {name: 10 ** rng.uniform(-2, 1) for name in warps}  # so that some lag far behind
    copies: list[Event] = []

    def arrive(barrier: Place, number: int) -> None:
        for _ in range(number):
            missing[barrier] -= 1
            if missing[barrier] == 0:
                missing[barrier], phases[barrier] = arrivals[barrier], phases[barrier] + 1

    def is_blocked(event: Event) -> bool:
        return event.kind == "wait" and phases[event.places[0]] % 2 == event.number % 2

    while True:
        unfinished = {
            name: events[next_event[name]] for name, events in warps.items() if next_event[name] < len(events)
        }
        ready = [name for name, event in unfinished.items() if not is_blocked(event)]
        if not ready and not copies:
            break
        choice = rng.choices([*ready, None], [*(speeds[name] for name in ready), len(copies)])[0]
        if choice is None:
            ended = copies.pop(rng.randrange(len(copies)))
            memory.update(dict.fromkeys(ended.places, ended.content))
            arrive(ended.barrier, 1)
            continue
        name = choice
        event = unfinished[name]
        next_event[name] += 1
        place = event.places[0]
        if event.kind == "wait":
            assert phases[place] == event.number + 1, f"{name} at {event}: {phases[place]} phases have ended"
        elif event.kind == "arrive":
            arrive(place, event.number)
        elif event.kind == "write":
            memory[place] = event.content
        elif event.kind == "copy":
            memory.update(dict.fromkeys(event.places))  # undefined until it has ended
            copies.append(event)
        else:
            found = memory.get(place)
            assert found == event.content, f"{name} at {event}: found {found}"
    assert not unfinished, f"nobody can go on: {unfinished}"
    assert missing == arrivals, "a phase is left open"
    return phases
