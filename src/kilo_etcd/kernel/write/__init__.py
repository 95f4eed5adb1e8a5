"""Requests to the kernel, packed from values. Nothing here reads; `kernel.read` does."""
