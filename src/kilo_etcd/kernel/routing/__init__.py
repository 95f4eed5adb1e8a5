"""Policy routing and routing tables of ours: values first, then what reads them."""
