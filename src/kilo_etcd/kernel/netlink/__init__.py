"""Netlink: pyroute2's message classes, a codec by shape, and plain sockets."""
