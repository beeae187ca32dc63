"""Numbers that are not finite, found where a model makes them: nothing is saved or ranked with one.

NaN spreads: a mean, a loss or a ranking that holds one says nothing, and comparisons with it are
silently false. So the run stops, and the error names the records whose numbers they were.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from selfsteer.errors import NumericsError, named

#: What usually helps where a frozen model is at fault.
ADVICE = (
    "Its weights are damaged or were trained too far, or its precision is too low: set "
    "policy.dtype: float32, lower the learning rate of the training that made it, or use another "
    "checkpoint. Finished stages are kept."
)


def check_values(values: Sequence[Tensor], records: Sequence[str], what: str) -> None:
    """Refuses values of which one is NaN or infinite.

    Args:
        values: per record, of any shape.
        records: their ids; may repeat.
        what: what they are and whose, as the subject of a sentence in the plural.

    Raises:
        NumericsError: names the records whose values are not finite.
    """
    bad = [r for v, r in zip(values, records, strict=True) if not bool(v.isfinite().all())]
    if bad:
        raise NumericsError(f"{what} are NaN or infinite on {named(bad)}. {ADVICE}")


def broken_weight(weights: Iterable[tuple[str, Tensor]]) -> str | None:
    """``3 of the 4,096 weights in NAME`` of the first tensor that holds NaN or an infinity."""
    for name, weight in weights:
        # one number tells of a tensor, and nothing is made of its size; a sum may overflow, too
        if weight.is_floating_point() and not weight.detach().sum(dtype=torch.float32).isfinite():
            bad = int((~weight.detach().isfinite()).sum())
            if bad:
                return f"{bad:,} of the {weight.numel():,} weights in {name}"
    return None
