"""Where `kgctl` begins. Most commands live for a fraction of a second, and most of what they make lives as long as they
do; the collector of cyclic garbage, as Python sets it, would go through all of it again and again.
"""

from __future__ import annotations

import gc

OBJECTS_BETWEEN_COLLECTIONS = 100_000
"""Python's default is 700. Commands that stay (`connect`, `--watch`) are collected all the same, some 10 MiB later."""


def main() -> None:
    """Run `kgctl`."""
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    from kilo_etcd.base.output import output_must_arrive
    from kilo_etcd.ctl.main import main as kgctl

    try:
        with output_must_arrive("kgctl"):
            kgctl()
    finally:
        gc.freeze()  # What is left goes with the process; nobody need look whether it is garbage.
