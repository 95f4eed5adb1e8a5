"""This host's candidacy for the leadership of its segment."""
