"""Tests in this directory may run in namespaces of their own."""

from helpers_namespaces import own_namespaces, pytest_pyfunc_call  # noqa: F401
