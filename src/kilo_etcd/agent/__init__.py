"""The agent `kg`: it follows etcd, decides with the pure rooms below, applies plans, and reports."""
