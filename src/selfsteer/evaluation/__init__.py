"""Judges, data quality, win rates and their intervals."""
