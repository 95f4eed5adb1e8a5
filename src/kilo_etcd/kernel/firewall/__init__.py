"""The packet filter: our nftables table, the forward chains of other programs, and our rules in them."""
