"""The recipe of an online run: every setting of DR-PO and PPO, by section."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from drpo.config import ConfigError
from drpo.data.load import DataConfig
from drpo.engine import EngineConfig
from drpo.kl import KLConfig
from drpo.models.loading import ModelConfig
from drpo.optim import OptimConfig
from drpo.rollout.generator import RolloutConfig
from drpo.rollout.held_out import EvalConfig
from drpo.rollout.resets import ResetConfig
from drpo.run.folder import CheckpointConfig, LogConfig, Resume
from drpo.trainers.credit import AdvantageConfig, ShapingConfig
from drpo.trainers.ppo_update import PPOConfig


@dataclass(frozen=True)
class CriticConfig:
    """Where the critic comes from and how it learns."""

    path: str | None = None
    """Reward model (or *ForSequenceClassification folder) to start from; null: the policy with a fresh head."""
    learning_rate: float | None = None
    """Peak learning rate of the critic; null takes optim.learning_rate."""
    warmup_steps: int | None = None
    """Learning-rate warm-up of the critic; null takes optim.warmup_steps."""
    pretrain_steps: int = 0
    """First steps in which the critic alone learns. The policy's learning-rate schedule begins after them."""

    def __post_init__(self) -> None:
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(f"critic.learning_rate must be > 0 or null, got {self.learning_rate}")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ValueError(f"critic.warmup_steps must be >= 0 or null, got {self.warmup_steps}")
        if self.pretrain_steps < 0:
            raise ValueError(f"critic.pretrain_steps must be >= 0, got {self.pretrain_steps}")


@dataclass(frozen=True)
class RewardConfig:
    """What scores the rollouts: a reward model or a Python callable."""

    path: str | None = None
    """Folder or hub id of a reward model."""
    function: str | None = None
    """Python callable as module:function; it gets a list of drpo.rewards.Completion and returns one number each."""
    batch_size: int = 32
    """Rows per forward of the reward model on one device."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the reward model's weights."""
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    """What happens to the score before training."""

    def __post_init__(self) -> None:
        if self.path is not None and self.function is not None:
            raise ValueError("give reward.path or reward.function, not both")
        for key in ("batch_size", "dtype"):
            default = getattr(RewardConfig, key)
            if self.function is not None and getattr(self, key) != default:
                raise ValueError(
                    f"reward.{key} is for a reward model (reward.path), and reward.function has none; drop it "
                    f"(reward.{key}={default})"
                )


@dataclass(frozen=True)
class OnlineRecipe:
    """Everything that decides an online run."""

    run_dir: str = "runs/drpo"
    """Folder of the run."""
    seed: int = 0
    """Seed of all randomness."""
    num_steps: int = 1953
    """Updates; each takes rollout.batch_size rollouts."""
    resume: Resume = "auto"
    """auto: go on from the last checkpoint in run_dir, if any. restart: move an earlier run aside."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    reset: ResetConfig = field(default_factory=ResetConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be >= 1, got {self.num_steps}")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")
        alone = self.critic.pretrain_steps
        if alone > self.num_steps:
            raise ValueError(f"critic.pretrain_steps ({alone}) must not exceed num_steps ({self.num_steps})")
        for key in ("optim.warmup_steps", "critic.warmup_steps"):
            warmup = getattr(self, key.split(".")[0]).warmup_steps
            if warmup is not None and warmup >= self.num_steps:
                raise ValueError(f"{key} is {warmup}, it must be below num_steps, {self.num_steps}")
        if alone < self.num_steps <= alone + self.optim.warmup_steps:
            raise ValueError(
                f"optim.warmup_steps is {self.optim.warmup_steps}, it must be below the steps in which the policy "
                f"learns, num_steps - critic.pretrain_steps = {self.num_steps - alone}"
            )
        if self.reset.proportion > 0 and self.reset.min_length >= self.rollout.max_response_length:
            raise ValueError(
                f"reset.min_length ({self.reset.min_length}) must be below rollout.max_response_length "
                f"({self.rollout.max_response_length}): no response could be reset"
            )
        if self.kl.target_per_token is not None and self.kl.horizon <= 0.2 * self.rollout.batch_size:
            raise ValueError(
                f"kl.horizon is {self.kl.horizon:g}, it must be above 0.2 * rollout.batch_size = "
                f"{0.2 * self.rollout.batch_size:g}: one update may lower the coefficient by that share, to below 0, "
                "where diverging from the reference is rewarded"
            )
        if not self.advantage.needs_critic:
            self._refuse_critic()
        if self.rollout.batch_size % self.ppo.num_minibatches:
            raise ValueError(
                f"ppo.num_minibatches ({self.ppo.num_minibatches}) must divide "
                f"rollout.batch_size ({self.rollout.batch_size})"
            )

    def _refuse_critic(self) -> None:
        """Raise ValueError for settings of a critic that advantage.estimator does not need."""
        estimator = self.advantage.estimator
        for section, keys in (("critic", None), ("ppo", ("value_coef", "value_clip_range"))):
            given, plain = getattr(self, section), type(getattr(self, section))()
            for key in keys or vars(plain):
                if getattr(given, key) != getattr(plain, key):
                    raise ValueError(
                        f"{section}.{key} does not apply to advantage.estimator={estimator}: there is no critic"
                    )
        if self.rollout.rollouts_per_prompt < 2:
            raise ValueError(
                f"advantage.estimator={estimator} compares the rollouts of a prompt; set "
                "rollout.rollouts_per_prompt to 2 or more"
            )

    @property
    def tokenizer_path(self) -> str:
        """Where the policy's tokenizer is. Raises ConfigError when the recipe names no policy."""
        path = self.model.tokenizer or self.model.path
        if path is None:
            raise ConfigError(
                "no policy to train: give model.path, a folder or hub id (launch/sft.py makes one)"
            )
        return path
