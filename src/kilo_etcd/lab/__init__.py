"""The lab: a small internet inside throwaway namespaces, with a real etcd and a real agent on every host.

It is the demo, the end-to-end test bed and the benchmark bed. `Spec` describes it, `running_lab` builds it and
leaves nothing behind, `Lab` operates it. Needs root, or unprivileged user namespaces.
"""

from kilo_etcd.lab.capture import Flow
from kilo_etcd.lab.client import Completed, Count, HostStatus, Lab, RunningCapture, RunningProbe, attach, running_lab
from kilo_etcd.lab.probe import Gap, ProbeResult
from kilo_etcd.lab.runtime import LabError, running_labs
from kilo_etcd.lab.spec import HostSpec, SiteSpec, Spec, SpecError, parse_spec, read_spec

__all__ = [
    "Completed",
    "Count",
    "Flow",
    "Gap",
    "HostSpec",
    "HostStatus",
    "Lab",
    "LabError",
    "ProbeResult",
    "RunningCapture",
    "RunningProbe",
    "SiteSpec",
    "Spec",
    "SpecError",
    "attach",
    "parse_spec",
    "read_spec",
    "running_lab",
    "running_labs",
]
