"""Probing: whether packets get through leaders and reach members of the location."""
