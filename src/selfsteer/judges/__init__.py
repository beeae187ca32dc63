"""Who compares answers, and the figures made of verdicts."""
