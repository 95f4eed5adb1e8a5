"""Leader hints: how hosts learn of leaders from each other while etcd is away."""
