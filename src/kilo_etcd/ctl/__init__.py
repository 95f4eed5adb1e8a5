"""kgctl's commands: what an operator asks of the mesh, answered from etcd alone. Nothing here changes a host."""
