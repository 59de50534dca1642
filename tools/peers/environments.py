"""What the peers of tools/bench_peers.py need: a virtual environment each, and the checkpoints in their formats.

Everything is made once, aside, and renamed into place, so that neither an error nor Ctrl-C leaves something half made.
Names carry a digest of what a thing was made of: other requirements, or another checkpoint, make another one.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from fly_trt.files import new_directory
from peers.catalogue import Peer

TOOLS = Path(__file__).resolve().parents[1]
# Nothing is downloaded but packages, and two of the peers would report their use to their makers.
ENVIRONMENT = {
    "PYTHONPATH": str(TOOLS),
    "PYTHONNOUSERSITE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "ORT_DISABLE_TELEMETRY": "1",
    "CI": "true",
}


class PreparationError(Exception):
    """What a peer needs could not be made. One line."""


def worker_environment() -> dict[str, str]:
    return os.environ | ENVIRONMENT


class Preparation:
    """Makes environments and models under `folder`, and says through `say` what takes minutes."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder = folder.resolve()
        self._say = say

    def python(self, peer: Peer) -> Path:
        """The interpreter of the peer's environment; this one for a peer that needs none. Raises PreparationError."""
        if not peer.requirements:
            return Path(sys.executable)
        release = "{}.{}".format(*sys.version_info)
        name = f"{peer.name}-{_digest([release, *map(str, peer.requirements), *peer.unwanted])}"
        environment = self._folder / name
        if not environment.exists():
            self._say(f"{peer.name}: installing {', '.join(peer.requirements[-1])} (minutes the first time)")
            with new_directory(environment) as workspace:
                self._install(peer, workspace)
        return environment / "bin" / "python"

    def model(self, peer: Peer, checkpoint: Path, precision: str) -> Path:
        """The checkpoint as the peer reads it. Raises PreparationError."""
        if peer.convert is None:
            return checkpoint
        form = peer.forms[precision]
        model = self._folder / "models" / f"{checkpoint.name}-{_checkpoint_digest(checkpoint)}-{peer.name}-{form}"
        if not model.exists():
            python = self.python(peer)
            self._say(f"{peer.name}: converting {checkpoint} to {form}")
            with new_directory(model) as workspace:
                run_quietly([python, *peer.convert(str(checkpoint), form, str(workspace))], f"converting {checkpoint}")
        return model

    def _install(self, peer: Peer, workspace: Path) -> None:
        run_quietly([sys.executable, "-m", "venv", workspace], "making a virtual environment")
        # By its module: a program of the environment knows it by the name that it has before it is renamed.
        pip = [workspace / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--quiet"]
        for requirements in peer.requirements:
            run_quietly([*pip, "install", *requirements], f"installing {', '.join(requirements)}")
        if peer.unwanted:
            run_quietly([*pip, "uninstall", "--yes", *peer.unwanted], f"removing {', '.join(peer.unwanted)}")


def run_quietly(command: list[str | Path], what: str) -> None:
    """Runs a command in the environment of the workers, and takes what it prints. Raises PreparationError."""
    done = subprocess.run(command, env=worker_environment(), capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        last = (errors or lines or [f"exit status {done.returncode}"])[-1].strip()
        raise PreparationError(f"{what} failed: {last}")


def _checkpoint_digest(checkpoint: Path) -> str:
    """Of names, sizes and times: reading the weights of a big checkpoint would take longer than loading them."""
    stats = [(path.name, path.stat()) for path in sorted(checkpoint.iterdir()) if path.is_file()]
    return _digest([f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats])


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]
