"""Tests in this directory may run in namespaces of their own, or have a whole agent in memory."""

from agent_world import world  # noqa: F401

from helpers_namespaces import own_namespaces, pytest_pyfunc_call  # noqa: F401
