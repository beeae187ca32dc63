"""A policy for llama.cpp and Ollama: its GGUF file, by llama.cpp's own converter, and a Modelfile.

The converter knows every architecture and tokenizer that llama.cpp can run, and belongs to a
version of llama.cpp, so it is the user's: nothing of it is here.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from selfsteer.errors import ArtifactError, ConfigError, clip
from selfsteer.methods import Aligning

CONVERTER = "convert_hf_to_gguf.py"


def converter(given: Path | None, again: str) -> list[str]:
    """The command that starts llama.cpp's converter.

    Args:
        given: the script, or the folder of llama.cpp's sources; None: the one on the PATH.
        again: the command to export with, for the message.

    Raises:
        ConfigError: it is not there.
    """
    if given is not None:
        script = given / CONVERTER if given.is_dir() else given
        if script.is_file():
            return [sys.executable, str(script)]
        found = f"there is no {script}"
    elif (on_path := shutil.which(CONVERTER)) is not None:
        return [on_path]
    else:
        found = f"{CONVERTER} is not on the PATH"
    raise ConfigError(
        f"--format gguf needs llama.cpp's converter, and {found}. Run: git clone --depth 1 "
        f"https://github.com/ggml-org/llama.cpp && pip install sentencepiece && {again} "
        "--llama-cpp llama.cpp"
    )


def convert(command: list[str], checkpoint: Path, file: Path) -> None:
    """Writes a checkpoint as GGUF, in 16 bits a weight.

    Args:
        command: see `converter`.
        checkpoint: what `save_pretrained` wrote.
        file: to write.

    Raises:
        ArtifactError: the converter failed; has its last words.
    """
    asked = [*command, str(checkpoint), "--outfile", str(file), "--outtype", "f16"]
    ended = subprocess.run(asked, capture_output=True, text=True, errors="replace")
    if ended.returncode != 0 or not file.is_file():
        said = (ended.stderr.strip() or ended.stdout.strip() or "nothing").splitlines()[-1]
        raise ArtifactError(
            f"llama.cpp's converter failed (exit code {ended.returncode}), and its last words are: "
            f"{clip(said, 300)}. If it does not know the model or its tokenizer, take a newer "
            "llama.cpp; if a module is missing, install its requirements.txt. Nothing was exported."
        )


def modelfile(recipe: Aligning, weights: str) -> str:
    """What ``ollama create NAME -f Modelfile`` reads: the weights, and how the run sampled.

    Args:
        recipe: of the run.
        weights: a GGUF file beside it, or ``.`` for the checkpoint.
    """
    given = recipe.sampling
    return (
        f"FROM {weights if weights == '.' else f'./{weights}'}\n"
        "# Ollama takes the chat template from the weights: ollama show --template NAME\n"
        f"PARAMETER temperature {given.temperature}\n"
        f"PARAMETER top_p {given.top_p}\n"
    )
