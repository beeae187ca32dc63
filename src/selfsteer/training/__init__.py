"""The trainer that knows terms, not methods."""
