"""The recipe of an online run: every setting of DR-PO and PPO, by section."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from drpo.config import ConfigError, Section, key, refuse, refuse_changed, setting
from drpo.data.load import DataConfig
from drpo.engine import EngineConfig
from drpo.models.loading import ModelConfig
from drpo.optim import OptimConfig
from drpo.rollout.generator import RolloutConfig
from drpo.rollout.held_out import EvalConfig
from drpo.rollout.resets import ResetConfig, length_limits, limits_text, reset_share
from drpo.rollout.vine import VineConfig
from drpo.rollout.vllm_requests import MIN_TEMPERATURE
from drpo.run.folder import CheckpointConfig, LogConfig, Resume
from drpo.trainers.credit import AdvantageConfig, KLConfig, ShapingConfig
from drpo.trainers.ppo_update import PPOConfig
from drpo.trainers.reward_parts import EnsembleConfig, RewardPart


@dataclass(frozen=True)
class CriticConfig(Section):
    """Source of the critic, and its learning rate."""

    path: str | None = None
    """Reward model (or *ForSequenceClassification folder) to start from; null: the policy with a fresh head."""
    learning_rate: float | None = setting(None, gt=0)
    """Peak learning rate of the critic; null takes optim.learning_rate."""
    warmup_steps: int | None = setting(None, ge=0)
    """Learning-rate warm-up of the critic; null takes optim.warmup_steps."""
    pretrain_steps: int = setting(0, ge=0)
    """First steps in which the critic alone learns. The policy's learning-rate schedule begins after them."""


SOURCES = ("path", "ensemble", "function", "parts", "url")
"Settings that name where scores come from, of which one is given."


@dataclass(frozen=True)
class RewardServerConfig(Section):
    """The server at reward.url, and how long a run waits for it."""

    kind: Literal["drpo", "openrlhf", "vllm"] = "drpo"
    """drpo: launch/serve_reward_model.py. openrlhf: its POST /get_reward. vllm: a classifier's POST /classify."""
    timeout_minutes: float = setting(10.0, gt=0)
    """How long to wait while the server is away or overloaded; then the run stops, and its checkpoints stay.
    Of several processes one may not wait as long, with request_seconds, as engine.timeout_minutes."""
    request_seconds: float = setting(120.0, gt=0)
    """Longest wait for the answer to one request before it is made again."""
    num_requests: int = setting(4, ge=1)
    """Requests of a training process that are under way at a time, of reward.batch_size rows each."""
    expected_path: str | None = None
    """kind=drpo: folder or hub id of the reward model that must be served. Zero, unit, aggregation, chat template and
    vocabulary are compared at the start, its weights are not read; null: any."""
    model: str | None = None
    """kind=vllm: name of the model on the server; null: its first."""
    stop_text: str = ""
    """kind=vllm: text put after a response that ended, such as the model's end-of-text token; conversations end as the
    server's chat template has it."""

    def check(self) -> None:
        if self.kind != "drpo":
            rule = f"is for {key('kind')}=drpo: other servers do not say what they serve; drop it"
            refuse_changed(self, ("expected_path",), rule)
        if self.kind != "vllm":
            refuse_changed(self, ("model", "stop_text"), f"is for {key('kind')}=vllm; drop it")


@dataclass(frozen=True)
class RewardConfig(Section):
    """Reward of the rollouts: a reward model, here or on a server, several as one, a Python callable, or a weighted
    sum of such parts."""

    path: str | None = None
    """Folder or hub id of a reward model."""
    ensemble: EnsembleConfig | None = None
    """Several reward models as one."""
    function: str | None = None
    """Python callable as module:function; it gets a list of drpo.rewards.Completion and returns one number each."""
    parts: list[RewardPart] = field(default_factory=list)
    """Parts of a weighted sum, each logged apart."""
    url: str | None = None
    """Server that scores, as http://host:port (launch/serve_reward_model.py starts one)."""
    batch_size: int = setting(32, ge=1)
    """Rows per forward of a reward model on one device; with reward.url rows per request."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the reward model's weights. In a bf16 run its matrices are bfloat16 either way: the same numbers."""
    offload: bool = False
    """Keep the reward model in the host's memory between its phases: it then shares no weights with other models."""
    server: RewardServerConfig = field(default_factory=RewardServerConfig)
    """What is at reward.url, and how long a run waits for it."""
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    """What happens to the score before training."""

    def check(self) -> None:
        given = [name for name in self.changed() if name in SOURCES]
        if len(given) > 1:
            both = "" if "url" in given else ", or make both reward.parts"
            rule = f"cannot be given together with {key(given[1])}; choose one{both}"
            refuse(True, given[0], rule)
        if self.url is None:
            refuse_changed(self.server, vars(self.server), f"is for {key('url')}, which is null", "server.")
        else:
            rule = f"({self.url}) must be http://host:port"
            refuse(not self.url.startswith(("http://", "https://")), "url", rule)
            rule = (
                f"is for a reward model in the training processes, and {key('url')} has it elsewhere; drop it"
            )
            refuse_changed(self, ("dtype", "offload"), rule)
        if given and given[0] != "url" and not self.models:
            rule = f"is for a reward model ({key('path')}), and {key(given[0])} has none; drop it"
            refuse_changed(self, ("batch_size", "dtype", "offload"), rule)
        names = [part.name for part in self.parts]
        for index, name in enumerate(names):
            rule = f"is that of {key('parts')}[{names.index(name)}] too ({name}); choose another"
            refuse(name in names[:index], f"parts[{index}].name", rule)

    @property
    def kind(self) -> str | None:
        """The setting that names the source of the scores."""
        return next((name for name in self.changed() if name in SOURCES), None)

    @property
    def models(self) -> dict[str, str]:
        """Path of every reward model, by its key within the section: path, ensemble.paths[1], parts[0].path."""
        return _models(self) | {
            f"parts[{index}].{name}": path
            for index, part in enumerate(self.parts)
            for name, path in _models(part).items()
        }


def _models(source: RewardConfig | RewardPart) -> dict[str, str]:
    models = {} if source.path is None else {"path": source.path}
    members = [] if source.ensemble is None else source.ensemble.paths
    return models | {f"ensemble.paths[{index}]": path for index, path in enumerate(members)}


@dataclass(frozen=True)
class OnlineRecipe(Section):
    """All settings of an online run."""

    run_dir: str = "runs/drpo"
    """Folder of the run."""
    seed: int = setting(0, ge=0)
    """Seed of all randomness."""
    num_steps: int = setting(1953, ge=1)
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
    vine: VineConfig = field(default_factory=VineConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def check(self) -> None:
        pretrain_steps, warmup = self.critic.pretrain_steps, self.optim.warmup_steps
        rule = f"({pretrain_steps}) must not exceed num_steps ({self.num_steps})"
        refuse(pretrain_steps > self.num_steps, "critic.pretrain_steps", rule)
        for section in ("optim", "critic"):
            steps = getattr(self, section).warmup_steps or 0
            rule = f"is {steps}, it must be below num_steps, {self.num_steps}"
            refuse(steps >= self.num_steps, f"{section}.warmup_steps", rule)
        rule = (
            f"is {warmup}, it must be below the steps in which the policy learns, num_steps - critic.pretrain_steps = "
            f"{self.num_steps - pretrain_steps}"
        )
        refuse(pretrain_steps < self.num_steps <= pretrain_steps + warmup, "optim.warmup_steps", rule)
        if self.reset.proportion > 0:
            self._check_reset_lengths()
            self._check_reset_steps()
            self._check_own()
        share = 0.2 * self.rollout.batch_size
        refuse(
            self.kl.target_per_token is not None and self.kl.horizon <= share,
            "kl.horizon",
            f"({self.kl.horizon:g}) must be above 0.2 * rollout.batch_size = {share:g}: one update may lower the "
            "coefficient by that share, to below 0, where diverging from the reference is rewarded",
        )
        self._check_critic()
        self._check_groups()
        rule = (
            "is for a copy of the policy; under LoRA the reference is the policy without its adapter: drop it"
        )
        refuse(self.kl.offload_reference and self.model.lora.r > 0, "kl.offload_reference", rule)
        rule = "is for a whole copy of the policy; with model.trainable_layers it shares the policy's layers: drop it"
        refuse(
            self.kl.offload_reference and self.model.trainable_layers is not None,
            "kl.offload_reference",
            rule,
        )
        self._check_vine()
        self._check_rollout_engine()
        rule = "folds an adapter in, and model.lora.r is 0: drop it"
        refuse(self.rollout.fold_lora and not self.model.lora.r, "rollout.fold_lora", rule)
        rule = f"({self.ppo.num_minibatches}) must divide rollout.batch_size ({self.rollout.batch_size})"
        refuse(self.rollout.batch_size % self.ppo.num_minibatches != 0, "ppo.num_minibatches", rule)

    def _check_critic(self) -> None:
        """Refuse settings of a critic that is not there or learns nothing, and of a policy that does not learn."""
        if not self.advantage.needs_critic:
            rule = f"does not apply to advantage.estimator={self.advantage.estimator}: there is no critic"
            refuse_changed(self.critic, vars(self.critic), rule, "critic.")
            refuse_changed(self.ppo, ("value_coef", "value_clip_range"), rule, "ppo.")
        elif self.ppo.value_coef == 0:
            rule = "does not apply to ppo.value_coef=0: the critic learns nothing; raise that, or drop it"
            refuse_changed(self.critic, ("pretrain_steps", "learning_rate", "warmup_steps"), rule, "critic.")
            refuse_changed(self.ppo, ("value_clip_range",), rule, "ppo.")
            refuse_changed(self.advantage, ("value_lam",), rule, "advantage.")
        if self.critic.pretrain_steps == self.num_steps:
            rule = (
                f"does nothing with critic.pretrain_steps=num_steps={self.num_steps}: the policy learns in no step; "
                "lower critic.pretrain_steps, or drop it"
            )
            refuse(self.reset.proportion > 0 and self.reset.sft_coef > 0, "reset.sft_coef", rule)

    def _check_groups(self) -> None:
        """Refuse estimators that lack a group of rollouts, and settings of groups where a prompt has one rollout."""
        if self.rollout.rollouts_per_prompt > 1:
            return
        estimator = f"advantage.estimator={self.advantage.estimator}"
        rule = f"must be >= 2 for {estimator}, which compares the rollouts of a prompt"
        refuse(self.advantage.compares_group, "rollout.rollouts_per_prompt", rule)
        rule = "does nothing with rollout.rollouts_per_prompt=1: a prompt has one rollout; raise that, or drop it"
        refuse(self.reset.proportion > 0 and self.reset.per == "prompt", "reset.per", rule)

    def _check_own(self) -> None:
        """Refuse own rollouts whose prompts would be all prompts, or several in one group."""
        num_rollouts = self.rollout.rollouts_per_prompt
        rule = (
            f"must be prompt for reset.source=own with rollout.rollouts_per_prompt={num_rollouts}: an own rollout "
            "brings its prompt with it, and the rollouts of a prompt would have several"
        )
        reset = self.reset
        stays = reset.source == "own" and reset.proportion == 1 and reset.proportion_schedule == "constant"
        refuse(
            stays,
            "reset.proportion",
            "must be below 1 for reset.source=own: own rollouts bring their prompts with them, so no further prompt "
            "would be seen after the first step; lower it, or set reset.proportion_schedule",
        )
        apart = reset.source == "own" and reset.per == "rollout" and num_rollouts > 1
        refuse(apart, "reset.per", rule)

    def _check_reset_lengths(self) -> None:
        """Refuse limits that no prefix meets, whatever the responses are.

        Those of the dataset are held against the limits once they are read (`check_resets`).
        """
        reset, longest_response = self.reset, self.rollout.max_response_length
        rule = (
            f"({reset.min_length}) must be below rollout.max_response_length ({longest_response}): no response could "
            "be reset; lower it, raise that, or set reset.proportion=0"
        )
        refuse(reset.min_length >= longest_response, "reset.min_length", rule)
        within = f"within {limits_text(reset, longest_response)}"
        if reset.from_data:
            equal_fractions = reset.min_fraction == reset.max_fraction
            has_one_length = equal_fractions or reset.min_length == longest_response - 1
        else:
            lengths = range(1, longest_response + 1)
            limits = [length_limits(reset, length, longest_response) for length in lengths]
            rule = (
                f"({reset.source}) has responses of 1 to {longest_response} tokens, and none of them has a prefix "
                f"{within}, so nothing would be reset; widen them, or set reset.proportion=0"
            )
            refuse(all(longest < max(1, shortest) for shortest, longest in limits), "reset.source", rule)
            has_one_length = all(longest <= shortest for shortest, longest in limits)
        rule = f"({reset.length}) chooses among lengths, and {within} there is one at most; widen them, or drop it"
        refuse(has_one_length and reset.length in ("adaptive", "curriculum"), "reset.length", rule)

    def _check_reset_steps(self) -> None:
        """Refuse schedules that end before a step whose resets serve the policy."""
        reset, num_steps, pretrain_steps = self.reset, self.num_steps, self.critic.pretrain_steps
        is_own = reset.source == "own" and num_steps > 1  # one step is a trial
        idle_steps = [(1, "reset.source=own has no rollouts to reset to before")] * is_own
        if pretrain_steps < num_steps:
            idle_steps += [(pretrain_steps, "the critic alone learns before (critic.pretrain_steps)")]
        for steps, reason in idle_steps:
            rule = (
                f"({reset.schedule_end:g}) must be above {steps} / num_steps = {steps / num_steps:g}, the share of "
                f"training done before step {steps + 1}: {reason}; raise it, or set reset.proportion=0"
            )
            refuse(reset_share(reset, steps / num_steps) == 0, "reset.schedule_end", rule)

    def _check_vine(self) -> None:
        estimator = self.advantage.estimator
        if estimator != "vine":
            rule = f"is for advantage.estimator=vine, and it is {estimator}; drop it"
            refuse_changed(self.vine, vars(self.vine), rule, "vine.")
            return
        rule = "must be paper for advantage.estimator=vine: forced tokens have no state to be compared with"
        refuse(self.reset.proportion > 0 and self.reset.masking != "paper", "reset.masking", rule)

    def _check_rollout_engine(self) -> None:
        if self.rollout.engine == "native":
            rule = (
                "is for rollout.engine=vllm: the native engine samples from the very policy that is trained"
            )
            refuse_changed(self.ppo, ("importance_sampling",), rule, "ppo.")
            return
        for name, value, is_used in (
            ("rollout.sampling.temperature", self.rollout.sampling.temperature, True),
            ("eval.temperature", self.eval.temperature, self.eval.every > 0),
        ):
            rule = f"({value:g}) must be 0 or >= {MIN_TEMPERATURE} for rollout.engine=vllm, which would sample at that"
            refuse(is_used and 0 < value < MIN_TEMPERATURE, name, rule)

    @property
    def tokenizer_path(self) -> str:
        """Path of the policy's tokenizer; raises ConfigError when the recipe names no policy."""
        path = self.model.tokenizer or self.model.path
        if path is None:
            raise ConfigError(
                "no policy to train: give model.path, a folder or hub id (launch/sft.py makes one)"
            )
        return path
