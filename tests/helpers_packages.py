"""What kilo-etcd requires, copied from the environment that runs the tests to where another Python finds it."""

from __future__ import annotations

import re
import shutil
import sysconfig
from importlib import metadata
from pathlib import Path


def copy_requirements(site: Path) -> None:
    """Copy the packages that kilo-etcd requires, and those that they require, but not kilo-etcd itself, into `site`."""
    ours = Path(sysconfig.get_paths()["purelib"])
    wanted, seen = ["kilo-etcd"], set[str]()
    while wanted:
        name = re.split(r"[^A-Za-z0-9_.-]", wanted.pop(), maxsplit=1)[0].lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # for another Python or system
        wanted += [line for line in distribution.requires or () if "extra ==" not in line]
        for file in distribution.files or () if name != "kilo-etcd" else ():
            source = Path(str(file.locate()))
            if source.is_relative_to(ours) and source.suffix != ".pyc":
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, site / file)
