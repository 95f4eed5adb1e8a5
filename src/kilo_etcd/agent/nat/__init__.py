"""NAT traversal: what this host's WireGuard observes of others, what it publishes of that, and what it waits for."""
