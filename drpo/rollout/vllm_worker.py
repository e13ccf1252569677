"""What launch/serve_rollouts.py adds to the workers of a vLLM server: they fetch the weights from the trainer."""

from __future__ import annotations

from drpo.rollout.weight_stream import fetch_weights


class WorkerExtension:
    """Mixed into vLLM's worker class (`--worker-extension-cls`), its methods called by /collective_rpc."""

    def fetch_weights(self, address: str, port: int, token: str, timeout: float) -> None:
        """Replace all weights by those of the trainer that listens at `address` and `port`.

        Layers are processed again as at loading, so packed and fused weights follow too.
        """
        self.reload_weights(weights_iterator=fetch_weights(address, port, token, timeout))
