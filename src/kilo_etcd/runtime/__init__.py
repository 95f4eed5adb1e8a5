"""What `kg` and `kgctl` share, `kgctl connect` most of all: parsing, etcd's flags, logging, key, lock and hosts files,
name lookup, facts about the host, and the reconciler. What the agent alone uses is in `agent/`."""
