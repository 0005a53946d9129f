"""The README's way around TensorFlow works, with pip alone and a wheel for the clone.

Run by `make dist`.
It is not one of pytest's tests, which do not use the network.
"""

import os
import subprocess
import venv

from documents import ROOT, blocks

FOLDER = ROOT / ".venvs/pip"
(WHEEL,) = (ROOT / "dist").glob("*.whl")
# `pip check` misses what was left out, and nothing else.
LEFT_OUT = [f"requires {name}, which is not installed." for name in ("tensorflow", "tf2jax")]

(commands,) = (code for _, code in blocks("README.md") if "--no-deps" in code)
first, second, *_ = (code for language, code in blocks("README.md") if language == "python")

venv.create(FOLDER, clear=True, with_pip=True)
environment = os.environ | {"PATH": f"{FOLDER / 'bin'}:{os.environ['PATH']}"}


def run(*command: str) -> subprocess.CompletedProcess:
    """What a user types in the environment, in a folder without the package."""
    done = subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="")
    return done


assert " .\n" in commands, commands
assert run("bash", "-ec", commands.replace(" .\n", f" {WHEEL}\n")).returncode == 0
missed = run("pip", "check").stdout.splitlines()
assert [line.partition(" 0.6.5 ")[2] for line in missed] == LEFT_OUT, missed
assert run("python", "-P", "-c", first + second).returncode == 0
size = sum(file.lstat().st_size for file in FOLDER.rglob("*") if file.is_file())
assert size < 0.9e9, f"the README says .8 GB, and it is {size / 1e9} GB"
print(f"The README's commands, by pip alone: {size / 1e9:.2f} GB")
