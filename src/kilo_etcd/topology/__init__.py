"""Decides, and only decides: which nodes share a leader, who leads, which networks are behind whom.

Plans for single hosts are made in `planning`.
"""
