"""The shared `__repr__` against the one that attrs writes, in a process of its own: it changes `attrs` itself."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys, attrs
if sys.argv[1] == "shared":
    from kilo_etcd.base.sharedrepr import share_repr
    share_repr()

@attrs.frozen
class Endpoint:
    host: str
    port: int = 7
    key: str = attrs.field(default="secret", repr=False)
    way: str = attrs.field(default="w", repr=str.upper)

@attrs.define(kw_only=True)
class Base:
    name: str
    other: object = None

@attrs.define(kw_only=True)
class Derived(Base):
    more: int = attrs.field(init=False)

@attrs.frozen
class Own:
    value: int
    def __repr__(self):
        return "own"

@attrs.define(repr=False)
class Hidden:
    value: int

@attrs.frozen
class Inherits(Own):
    more: int = 0

def local():
    @attrs.frozen
    class Inner:
        @attrs.frozen
        class Nested:
            value: int
    return Inner.Nested

@attrs.define
class Failure(Exception):
    reason: str

unset = Derived(name="n")
cycle = Base(name="c")
cycle.other = [cycle]
for each in (Endpoint("h"), Base(name="n", other=Endpoint("x")), unset, Own(1), Inherits(1), local()(3), cycle,
             Failure("why")):
    print(repr(each))
print(type(Hidden(1)).__repr__ is object.__repr__)
"""


def _shown(how: str) -> str:
    return subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True).stdout


def test_the_shared_text_is_attrs_own_and_shows_no_secret() -> None:
    own = _shown("attrs")
    assert _shown("shared") == own
    assert own.startswith("Endpoint(host='h', port=7, way=W)\n")
