"""How strongly the contrast of the principles colours a token."""

#: Nats from which on the principles like a token, or dislike it, a little, clearly and strongly.
LEVELS = (0.1, 0.3, 1.0)


def level(value: float) -> int:
    """How much the principles like a token: -3 to 3; 0 where they hardly care.

    Args:
        value: log π(token|x+) − log π(token|x-), nats.

    >>> [level(v) for v in (0.05, 0.2, -0.5, 4.0)]
    [0, 1, -2, 3]
    """
    size = sum(abs(value) >= bound for bound in LEVELS)
    return size if value > 0 else -size
