"""How an agent ends other than by being asked to stop once: exceptions for whoever runs it."""

from __future__ import annotations


class Fatal(Exception):
    """The agent cannot go on; the message is the sentence for the operator."""


class StoppedAtOnce(Fatal):
    """Asked to stop a second time."""


class Reload(Exception):
    """The agent was asked to run its code anew. Nothing was given up: the next one adopts all of it."""
