"""What the agent and `kgctl connect` share: applying plans, options, logging, lock and key files, discovery."""
