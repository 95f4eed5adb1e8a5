"""What is wrong with a host: the order of the status, and what is logged of it."""

from __future__ import annotations

from structlog.testing import capture_logs

from kilo_etcd.agent.troubles import HostTrouble, Troubles, sentences
from kilo_etcd.runtime.logs import Once, get_logger


class Host:
    """What the sources say, and how often the status was published."""

    def __init__(self) -> None:
        self.contested: str | None = None
        self.names: tuple[str, ...] = ()
        self.published = 0
        self.troubles = Troubles(
            Once(get_logger()),
            {HostTrouble.CONTESTED: lambda: self.contested, HostTrouble.NAMES: lambda: self.names},
            on_change=self.publish,
        )

    def publish(self) -> None:
        self.published += 1


def test_all_are_in_the_order_of_the_status_whatever_came_first() -> None:
    host = Host()
    host.troubles.note({HostTrouble.CLOCK: "the clock went back"})
    host.troubles.note({HostTrouble.FORWARDING: ("one chain", "another chain"), HostTrouble.DROPPED_NETWORKS: None})
    host.names, host.contested = ("a copy",), "contested"
    assert host.troubles.all() == ("a copy", "one chain", "another chain", "contested", "the clock went back")
    host.troubles.note({HostTrouble.FORWARDING: ()})
    host.names, host.contested = (), ""
    assert host.troubles.all() == ("the clock went back",)


def test_what_is_noted_together_is_published_once() -> None:
    host = Host()
    host.troubles.note({HostTrouble.FORWARDING: "a chain", HostTrouble.DROPPED_NETWORKS: "another"})
    assert host.published == 1
    host.troubles.keep(HostTrouble.SETTINGS, "a flag")
    assert host.published == 1, "its caller publishes"
    assert host.troubles.of(HostTrouble.SETTINGS) == ("a flag",)


def test_a_sentence_is_logged_when_it_comes_and_when_it_goes() -> None:
    host = Host()
    with capture_logs() as lines:
        for _ in range(2):
            host.troubles.note({HostTrouble.EXIT_NODE: "it does not answer"})
        host.troubles.note({HostTrouble.EXIT_NODE: None})
        host.troubles.note({HostTrouble.RELOAD: "its caller has logged that"})
    assert [(line["log_level"], line["event"]) for line in lines] == [
        ("warning", "it does not answer"),
        ("info", "no longer: it does not answer"),
    ]


def test_what_another_part_logs_is_left_out_of_the_log_alone() -> None:
    host = Host()
    with capture_logs() as lines:
        host.troubles.keep(HostTrouble.STATE_DIRECTORY, "the disk is full", logged="the disk is full")
    assert (lines, host.troubles.all()) == ([], ("the disk is full",))


def test_news_of_a_source_is_logged_and_published() -> None:
    host = Host()
    host.contested = "another writer"
    with capture_logs() as lines:
        host.troubles.look(HostTrouble.CONTESTED)
    assert ([line["event"] for line in lines], host.published) == (["another writer"], 1)


def test_sentences_have_no_empty_one() -> None:
    assert [sentences(what) for what in (None, "", "a", ("a", "", "b"))] == [(), (), ("a",), ("a", "b")]
