"""kilo-etcd: a WireGuard mesh across data centres for plain hosts, shaped by labels in etcd."""

__version__ = "0.1.0"
