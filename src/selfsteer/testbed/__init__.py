"""A tiny world with an exact oracle: small, honest, measurable."""
