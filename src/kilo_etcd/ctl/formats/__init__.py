"""Peers and WireGuard configurations as text that other programs read and write."""
