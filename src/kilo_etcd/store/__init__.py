"""What the mesh remembers, in etcd: keys, records, the mirror of them all, and this host's own `session`.

Uses etcd through `kilo_etcd.etcd.api.Client` only, so the in-memory etcd of `kilo_etcd.testing` serves as well.
"""
