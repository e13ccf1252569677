"""What the speed benchmark measures beside this build: an earlier commit, and an earlier TRL."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from drpo.config import ConfigError
from launch.command_line import call
from launch.demo_inputs import LAUNCH


@dataclass(frozen=True)
class Tools:
    """The folder of all measurements, a checkout of the earlier commit, and the Python that has a TRL with PPO."""

    root: Path
    before: Path
    python_with_ppo: Path


def checkout(baseline: str, folder: Path) -> Path:
    """Return a checkout of an earlier commit: `baseline` itself if it is a folder, else a git worktree at `folder`."""
    if Path(baseline).is_dir():
        folder = Path(baseline).resolve()
    elif not folder.is_dir():
        command = ["git", "-C", str(LAUNCH), "worktree", "add", "--force", "--detach", str(folder), baseline]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ConfigError(
                f"baseline: {baseline!r} is no folder, and git has no such commit to check out "
                f"({done.stderr.strip()}); give a checkout, or null to leave these measurements out"
            )
    if not (folder / "launch" / "drpo.py").is_file():
        raise ConfigError(f"baseline: {str(folder)!r} is no checkout, it has no launch/drpo.py")
    return folder


def environment_with_trl(version: str, check: str, root: Path) -> Path:
    """Return the Python of an environment with this TRL over the packages of ours; made where it is missing.

    Args:
        version: minor version of TRL.
        check: a statement that must run there.
        root: folder of the environment and of its log.

    Raises StageFailed, naming the log, if it cannot be made.
    """
    folder = root / f"trl_{version}"
    python, ready, log = folder / "bin" / "python", folder / "ready", root / f"trl_{version}.log"
    if not ready.is_file():
        call(1, ["-m", "venv", "--without-pip", "--clear", str(folder)], log)
        packages = next((folder / "lib").glob("python*/site-packages"))
        ours = [path for path in sys.path if path.endswith("site-packages")]
        (packages / "ours.pth").write_text(
            "".join(f"import site; site.addsitedir({path!r})\n" for path in ours)
        )
        # Its own dependencies are those of the TRL that we have.
        call(1, ["-m", "pip", "--python", str(python), "install", "--no-deps", f"trl=={version}.*"], log)
        call(1, ["-c", check], log, python=python)
        ready.touch()
    return python
