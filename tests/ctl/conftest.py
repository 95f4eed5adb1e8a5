"""Tests in this directory may run in namespaces of their own, or find an etcd in memory in place of the real one."""

from ctl_world import fake, virtual_time  # noqa: F401

from helpers_namespaces import own_namespaces, pytest_pyfunc_call  # noqa: F401
