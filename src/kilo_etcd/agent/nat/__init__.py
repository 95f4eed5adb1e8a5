"""What this host's WireGuard observes of others, what is published of that, and what is waited for: NAT traversal,
peers that do not answer, and peers that have begun anew."""
