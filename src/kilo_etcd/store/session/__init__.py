"""What one host keeps in etcd: its registration, candidacy, status and published records, under two leases."""
