"""`kgctl connect`: this machine as a peer that follows the mesh while the command runs (decision 0009)."""
