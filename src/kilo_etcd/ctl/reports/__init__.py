"""What `kgctl` says of the mesh, as values, and how it looks."""
