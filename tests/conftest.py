"""What all tests share: `async def test_...` runs under trio, with a deadline of five minutes for each test.

`@pytest.mark.autojump` gives a test virtual time (trio's mock clock, which jumps when every task waits); then the
deadline is years away: reached at once, and failing, when nothing is left to happen. `@pytest.mark.deadline(seconds)`
changes the deadline. Helpers that tests import are in `helpers.py`.
"""

from __future__ import annotations

import gc
import inspect
import os
import signal
from functools import partial
from typing import Any

import hypothesis
import pytest
import structlog
import trio
import trio.testing

from helpers import examples

DEADLINE = 300.0

# A run in the background of a script (`make test &`) ignores Ctrl-C, and so would the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A slow machine is no failure. In CI the change is judged, not the dice: the same examples each time.
hypothesis.settings.register_profile(
    "kilo-etcd", deadline=None, derandomize=bool(os.environ.get("CI")), max_examples=examples(100)
)
hypothesis.settings.load_profile("kilo-etcd")


NEEDS = ("etcd", "root", "lab", "guest")
"""Markers of tests that run in a stream of their own."""

NOT_FAST = {*NEEDS, "graphviz"}
"""Markers of tests that need what an ordinary user may not have: `--fast` leaves them out."""


LAST = 6
"""The rank of tests that need nothing."""

NICE = 5
"""Their priority (nice(1)), by which they delay no test beside them that looks at times."""


def _stream(item: pytest.Item) -> tuple[int, str]:
    """When a test begins, as a rank, and the name of what runs one after the other with it."""
    needs = {name for name in NEEDS if item.get_closest_marker(name) is not None}
    beside = item.get_closest_marker("beside") is not None
    if not needs:
        return LAST, item.nodeid.partition("[")[0]
    if "guest" in needs:
        return (2, "guest beside") if beside else (0, "guest")
    if beside:
        return 5, str(item.path.relative_to(item.config.rootpath))
    if "lab" in needs:
        return 1, "lab"
    return (3, "here") if "root" in needs else (4, "etcd")


ID_LENGTH = 200
"""Characters of a parameter that stand in the name of its test."""


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name a long parameter by its beginning: xdist sends each name many times, and pytest sets it as a variable of
    the environment. pytest numbers those that are then alike."""
    if isinstance(val, str | bytes) and len(val) > ID_LENGTH:
        return f"{val[:ID_LENGTH]!r}... ({len(val)})"
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--fast`, for `make test-fast` and `make matrix`."""
    parser.addoption("--fast", action="store_true", help="only tests that need no root and no program of the system")


def pytest_collection() -> None:
    """What is imported stays, so that looking for garbage among it is in vain."""
    gc.disable()


# Before xdist's own hook, which reads the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--fast`, leave out what is not. Make streams for `pytest --dist loadgroup`, the longest first. Where
    packets and times are looked at, nothing runs beside itself: guests, which have one processor each, are a stream,
    and so are labs, what else uses this machine's namespaces and clock, and real etcd servers on loopback, which mostly
    wait. The rest runs beside them: guests that are marked `beside`, what else is marked so, file by file, and what
    needs nothing, test by test, so that no worker has much left when the others have nothing."""
    if config.getoption("fast"):
        left_out = {item for item in items if NOT_FAST & {mark.name for mark in item.iter_markers()}}
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=list(left_out))
    items.sort(key=lambda item: _stream(item)[0])
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_stream(item)[1]))


def pytest_collection_finish() -> None:
    """Exempt from garbage collection what all tests share, which is most of what there is, and collect less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Give each test structlog as it is by itself: an earlier one may have set a level at which nothing is logged."""
    structlog.reset_defaults()
    if _stream(item)[0] == LAST:
        # A worker that comes to these has none of the others any more.
        os.setpriority(os.PRIO_PROCESS, 0, max(NICE, os.getpriority(os.PRIO_PROCESS, 0)))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    test = pyfuncitem.obj
    # hypothesis wraps the async function in a sync one; what runs inside is `inner_test`.
    hypothesis_handle = getattr(test, "hypothesis", None)
    if hypothesis_handle is not None and inspect.iscoroutinefunction(hypothesis_handle.inner_test):
        inner = hypothesis_handle.inner_test

        def in_trio(*args: Any, **kwargs: Any) -> None:
            _run(pyfuncitem, partial(inner, *args, **kwargs))

        hypothesis_handle.inner_test = in_trio
        return None
    if not inspect.iscoroutinefunction(test):
        return None
    wanted = pyfuncitem._fixtureinfo.argnames
    _run(pyfuncitem, partial(test, **{name: pyfuncitem.funcargs[name] for name in wanted}))
    return True


def _run(item: pytest.Function, test: Any) -> None:
    mark = item.get_closest_marker("deadline")
    virtual = item.get_closest_marker("autojump") is not None
    deadline = float(mark.args[0]) if mark else 1e9 if virtual else DEADLINE

    async def bounded() -> None:
        with trio.fail_after(deadline):
            await test()

    # `strict_exception_groups` is trio's default; a lone failure in a test's nursery is shown as itself.
    try:
        trio.run(bounded, clock=trio.testing.MockClock(autojump_threshold=0) if virtual else None)
    except BaseExceptionGroup as group:
        lone: BaseException = group
        while isinstance(lone, BaseExceptionGroup) and len(lone.exceptions) == 1:
            lone = lone.exceptions[0]
        if lone is group:
            raise
        raise lone from None
