"""The command line with four queries held out, however few there are: `python patched.py run …`.

Where DIES_AFTER says so, rank 1 is killed when so many steps are done. Where NEVER_WHOLE is set, a
training that would have every rank hold the whole model while it is saved fails; where NEVER_LOADED
is set, one that loads it whole.
"""

import os
import signal
from collections.abc import Sequence
from typing import Any

from selfsteer import cli
from selfsteer.stages import fit


def hold_out_four(ids: Sequence[str], settings: Any, seed: int) -> set[str]:
    return set(sorted(ids)[:4])


def never_whole(*args: Any, **more: Any) -> Any:
    raise AssertionError("every rank would hold the whole model")


def mortal(step: Any) -> Any:
    def until_then(trainer: Any, *args: Any) -> Any:
        if str(trainer.state.global_step) == os.environ["DIES_AFTER"] and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer, *args)

    return until_then


if __name__ == "__main__":
    fit.hold_out = hold_out_four
    if "DIES_AFTER" in os.environ:
        from selfsteer.training.trainer import RowTrainer

        RowTrainer.training_step = mortal(RowTrainer.training_step)  # type: ignore[method-assign]
    if "NEVER_WHOLE" in os.environ:
        from selfsteer.training import trainer

        trainer.whole = never_whole
    if "NEVER_LOADED" in os.environ:
        from selfsteer.models import load

        load.load_whole = never_whole
    cli.main()
