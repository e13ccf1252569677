"""Hold policy and critic as one module, so that DDP or DeepSpeed wraps, steps and saves both as one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedConfig

from drpo.models.shared_prompt import continuation_logprobs, continuation_values, packed_states
from drpo.models.trunk import resumed_from
from drpo.tensors import PaddedBatch


class ActorCritic(nn.Module):
    """Policy and critic: log pi(y_t | x, y_<t), its entropy and V(x, y_<t) of a batch's response tokens.

    Args:
        policy: a causal language model.
        critic: a scalar model; None for an estimator without values.
        temperature: divides the logits.
        suppressed_ids: ids that the policy never samples.
        entropy_gradient: whether the entropy has a gradient.
    """

    def __init__(
        self,
        policy: nn.Module,
        critic: nn.Module | None,
        *,
        temperature: float = 1.0,
        suppressed_ids: Sequence[int] = (),
        entropy_gradient: bool = True,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic
        self._scoring = {
            "temperature": temperature,
            "suppressed_ids": tuple(suppressed_ids),
            "entropy": True if entropy_gradient else "detached",
        }

    @property
    def config(self) -> PreTrainedConfig:
        """The policy's config, from which DeepSpeed reads the hidden size."""
        return self.policy.config

    def forward(
        self,
        queries: Tensor,
        query_mask: Tensor,
        responses: Tensor,
        response_mask: Tensor,
        trunk: Tensor | None = None,
        num_continuations: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute (logprobs, entropy, values), each (B, R) float32.

        Rollout and training both use this forward, so that under autocast too the old log-probs equal those of the
        first training forward.

        Args:
            queries, query_mask: (B, Q) int64 and bool, as in a PaddedBatch.
            responses, response_mask: (B, R) int64 and bool.
            trunk: output (B, Q+R, H) of the frozen layers that policy and critic share (drpo.models.trunk); with it
                only the layers above run.
            num_continuations: K, where the rows are K blocks with the same queries, which are computed once.
        """
        batch = PaddedBatch(queries, query_mask, responses, response_mask)
        models = (self.policy,) if self.critic is None else (self.policy, self.critic)
        with resumed_from(packed_states(trunk, batch, num_continuations), *models):
            scores = continuation_logprobs(self.policy, batch, num_continuations, **self._scoring)
            values = None
            if self.critic is not None:
                values = continuation_values(self.critic, batch, num_continuations)
            return scores.logprobs, scores.entropy, values
