"""Decides what one host's kernel holds, as a function of the topology and of what the host knows. Pure."""
