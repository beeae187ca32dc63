"""Queries and the principles written for them."""
