"""For tests and the simulation: an etcd and a kernel in memory, real etcd servers, and certificates."""
