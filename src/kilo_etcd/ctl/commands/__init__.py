"""One module for each subcommand of `kgctl`."""
