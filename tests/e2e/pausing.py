"""The command line, which stops itself where a stage begins: `python pausing.py STAGE run …`."""

import os
import signal
import sys
from unittest import mock

from selfsteer import cli
from selfsteer.run.folder import RunFolder, StageResult
from selfsteer.run.stage import Stage

if __name__ == "__main__":
    name, execute = sys.argv.pop(1), RunFolder.execute

    def pausing(run: RunFolder, stage: Stage) -> StageResult:
        if stage.name == name:
            os.kill(os.getpid(), signal.SIGSTOP)
        return execute(run, stage)

    with mock.patch.object(RunFolder, "execute", pausing):
        cli.main()
