"""What launch/serve_rollouts.py adds to the workers of a vLLM server: they fetch the weights from the trainer."""

from __future__ import annotations

from drpo.rollout.weight_stream import fetch_weights


class WorkerExtension:
    """Mixed into vLLM's worker class (`--worker-extension-cls`), its methods called by /collective_rpc."""

    half_loaded = False
    "Whether a transfer was cut off: vLLM then keeps layers half loaded, and would count their weights twice."

    def fetch_weights(self, address: str, port: int, token: str, timeout: float) -> None:
        """Replace all weights by those of the trainer that listens at `address` and `port`.

        Layers are processed again as at loading, so packed and fused weights follow too. Raises RuntimeError after a
        transfer that was cut off.
        """
        if self.half_loaded:
            raise RuntimeError("an earlier transfer of weights was cut off: restart this server")
        self.half_loaded = True
        self.reload_weights(weights_iterator=fetch_weights(address, port, token, timeout))
        self.half_loaded = False
