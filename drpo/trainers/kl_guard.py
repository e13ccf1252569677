"""The guard of the KL to the reference: stop the run, or roll back, when it exceeds kl.max_per_token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drpo.engine import Engine
from drpo.run.checkpoints import list_checkpoints, step_of
from drpo.run.folder import RunFolder
from drpo.run.stopped import RunStopped
from drpo.trainers.credit import KLConfig

MEASURED = "objective/kl_k3_per_token"


class KLGuard:
    """Guard that counts rollbacks, and knows whether the last step was one."""

    def __init__(self, config: KLConfig) -> None:
        self._config = config
        self.num_rollbacks = 0
        self._rolled_back = False

    @property
    def needs_first_checkpoint(self) -> bool:
        """Whether a run must save before its first step, so that it can roll back."""
        return self._config.max_per_token is not None and self._config.on_max == "rollback"

    def passes(self, metrics: Mapping[str, float]) -> bool:
        """Return whether the KL of a batch is within the limit."""
        limit = self._config.max_per_token
        passes = limit is None or metrics[MEASURED] <= limit
        if passes:
            self._rolled_back = False
        return passes

    def roll_back(self, engine: Engine, run: RunFolder, step: int, metrics: Mapping[str, float]) -> Path:
        """Restore the last weights whose KL was below the limit, and return their checkpoint.

        Raises RunStopped, naming the last checkpoint, when a rollback is disabled, did not help or is not possible.
        """
        checkpoints = engine.from_main(list_checkpoints(run.path))
        # The weights after step-1 exceed the limit: an earlier checkpoint is needed.
        earlier = [folder for folder in checkpoints if step_of(folder) < step - 1]
        message = (
            f"step {step}: KL to the reference is {metrics[MEASURED]:.3g} nats per sampled token, "
            f"above kl.max_per_token={self._config.max_per_token:g}"
        )
        reason = None
        if self._config.on_max == "stop":
            reason = ""
        elif self._rolled_back:
            reason = "; going back did not help"
        elif not earlier:
            reason = f"; no checkpoint from before step {step - 1} is left: checkpoint.every, checkpoint.keep"
        if reason is not None:
            raise RunStopped(
                f"{message}{reason}. Last checkpoint: {checkpoints[-1] if checkpoints else 'none'}. "
                "Raise kl.coef or lower optim.learning_rate"
            )
        run.say(f"{message}: back to the weights of {earlier[-1]}")
        engine.load_state(earlier[-1])
        self.num_rollbacks += 1
        self._rolled_back = True
        return earlier[-1]

    def state_dict(self) -> dict[str, Any]:
        return {"num_rollbacks": self.num_rollbacks, "rolled_back": self._rolled_back}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_rollbacks, self._rolled_back = state["num_rollbacks"], state["rolled_back"]
