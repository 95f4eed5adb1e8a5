"""Has the others forget this host's handshakes when its clock went back, and says so for as long as it matters.

`runtime.set_back` decides; `nat.wireguard_monitor` reads the clock and wakes this.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from kilo_etcd.agent.registration import HostRegistration
from kilo_etcd.runtime.set_back import SetBack
from kilo_etcd.runtime.unanswered_peers import UnansweredPeers

CLOCK_PERIOD = 10.0
"""Seconds between two looks at whether it still matters that the clock went back."""


class ClockWatch:
    """`run` is its task. `unanswered` gives the peers that do not answer; `note` takes the sentence on the clock, when
    it is another one (None: there is none)."""

    def __init__(
        self,
        registration: HostRegistration,
        *,
        unanswered: Callable[[], UnansweredPeers],
        note: Callable[[str | None], None],
    ) -> None:
        self._registration, self._unanswered, self._note = registration, unanswered, note
        self.set_back = SetBack()
        self._sentence: str | None = None
        self._news = trio.Event()

    def wake(self) -> None:
        """`set_back` has something new."""
        self._news.set()

    async def run(self) -> None:
        """Register epochs and note the sentence, until cancelled."""
        while True:
            await self._news.wait()
            self._news = trio.Event()
            while True:
                now = trio.current_time()
                if (epoch := self.set_back.epoch(self._registration.clock_epoch, now=now)) is not None:
                    self._registration.clock_epoch = epoch
                    await self._registration.look_again(register=True)
                # Of outside peers silence says little: they sleep.
                sentence = self.set_back.sentence(unanswered=self._unanswered(), now=now)
                if sentence != self._sentence:
                    self._sentence = sentence
                    self._note(sentence)
                if self._news.is_set() or not self.set_back.matters(now=now):
                    break
                with trio.move_on_after(CLOCK_PERIOD):
                    await self._news.wait()
