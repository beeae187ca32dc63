"""Settings: sections, and how they are read."""
