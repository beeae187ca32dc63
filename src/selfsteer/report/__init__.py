"""Reads a run folder and shows it; imported by nobody but the cli."""
