"""The only file that uses accelerate and DeepSpeed: processes, precision, backward, collectives, state."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState, is_initialized
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    convert_outputs_to_fp32,
    gather_object,
    parse_flag_from_env,
)
from rich.console import Console
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from drpo import fully_sharded
from drpo.config import ConfigError, Section, setting
from drpo.models import four_bit
from drpo.models.frozen_weights import round_frozen
from drpo.precision import PRECISIONS, choose_precision, settled_why, slow_bf16_warning
from drpo.run.stopped import Interrupted

SETTLE_SECONDS = 0.1
"Time for gloo to drop what the last collective held."
FLAGS = tuple(f"ACCELERATE_{name}" for name in ("USE_CPU", "USE_FSDP", "DEBUG_MODE", "CPU_AFFINITY"))
"Environment variables that accelerate reads as true or false."


@dataclass(frozen=True)
class EngineConfig(Section):
    """Precision and trackers; `accelerate launch` sets the processes and devices."""

    mixed_precision: Literal["no", "bf16"] | None = None
    """Autocast precision; no is float32, without TF32. In bf16 frozen matrices are rounded to it, in the saved policy
    too. null takes what `accelerate launch --mixed_precision` or its config file says; without them bf16 on a GPU or
    CPU that has instructions for it, else float32."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """accelerate trackers by name (tensorboard, wandb, comet_ml, mlflow, ...); [] for none."""
    project: str = "drpo"
    """Project name given to the trackers."""
    timeout_minutes: float = setting(60.0, gt=0)
    """How long a process waits for the others (a checkpoint being written, a slow reward) before the run fails."""


_DDP = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
"In a step of one micro-batch gradients are not kept twice."


def _check_flags() -> None:
    """Raise ConfigError for an environment variable of accelerate that is neither true nor false."""
    for name in FLAGS:
        try:
            parse_flag_from_env(name)
        except ValueError:
            raise ConfigError(
                f"the environment variable {name} is {os.environ[name]!r}: set it to true or false, or unset it"
            ) from None


def _device_type(cpu: bool) -> str:
    """Return the type of device that accelerate will choose."""
    if cpu or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return "cpu"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _say(message: str) -> None:
    Console().print(message, highlight=False, soft_wrap=True, markup=False)


class Engine:
    """A prepared module and optimizer on every process, and the collectives that trainers need."""

    def __init__(self, config: EngineConfig, run_dir: Path, seed: int, max_grad_norm: float | None) -> None:
        _check_flags()
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # unset, DeepSpeed searches, with a warning
        several_on_cpu = "WORLD_SIZE" in os.environ and not torch.cuda.is_available()
        group = {"timeout": timedelta(minutes=config.timeout_minutes)}
        if several_on_cpu:
            group["backend"] = "gloo"
        with_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
        # Without it accelerate treats several CPU processes as one; with it it ignores DeepSpeed.
        cpu = several_on_cpu and not with_deepspeed
        with_fsdp = parse_flag_from_env("ACCELERATE_USE_FSDP")
        if with_fsdp:
            fully_sharded.check_version()
        if with_fsdp and several_on_cpu:
            # accelerate reads the settings of FSDP on GPUs only: processes on CPU would silently train without it.
            PartialState(cpu=True, **group)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        precision, reason = config.mixed_precision, ""
        if not is_initialized():  # accelerate keeps one precision per process
            launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no" if with_deepspeed else None)
            precision, reason = choose_precision(precision, launcher, _device_type(cpu))
        self._accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=precision,
            log_with=config.trackers or None,
            project_dir=str(run_dir),
            kwargs_handlers=[InitProcessGroupKwargs(**group), _DDP],
            step_scheduler_with_optimizer=False,
        )
        # Otherwise backward would divide the loss by the accumulation steps of the environment or accelerate config.
        self._accelerator.gradient_accumulation_steps = 1
        self.rank = self._accelerator.process_index
        self.world_size = self._accelerator.num_processes
        self.is_main = self._accelerator.is_main_process
        self.device: torch.device = self._accelerator.device
        self.precision: str = self._accelerator.mixed_precision
        self.optimizer: torch.optim.Optimizer | None = None
        self._deepspeed = self._accelerator.distributed_type == DistributedType.DEEPSPEED
        self.fully_sharded = self._accelerator.distributed_type == DistributedType.FSDP
        if self.fully_sharded:
            fsdp = self._accelerator.state.fsdp_plugin
            fully_sharded.check_plugin(fsdp)
            # Its policy would round all weights and the outputs to bf16; `prepare` uses autocast instead.
            fsdp.mixed_precision_policy = None
        self._max_grad_norm = max_grad_norm
        self._module: nn.Module | None = None
        self._config = config
        self._warned_of_bf16 = False
        self.stop_requested = threading.Event()
        "Set on SIGTERM or SIGINT, where a run handles them: waits for servers end."
        self._at_close: list[Callable[[], None]] = []
        plugin = self._accelerator.state.deepspeed_plugin
        if plugin is not None:
            # We accumulate ourselves (the last micro-batch of a step is marked), so DeepSpeed sees one per step.
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
            plugin.deepspeed_config["gradient_accumulation_steps"] = 1
            plugin.deepspeed_config["gradient_clipping"] = max_grad_norm or 0.0
            # In bf16, DeepSpeed's own choice, each of 32 micro-batches adds a rounding of the gradient's sum.
            plugin.deepspeed_config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
            # Models load whole on every process; `prepare` and `partition` cut them.
            unset_hf_deepspeed_config()
        reason = settled_why(config.mixed_precision, precision, self.precision, reason)
        if self.is_main and reason:
            _say(f"precision: {PRECISIONS[self.precision]}, {reason}")
        if self.precision == "bf16":
            self._warn_if_bf16_is_slow()
        # For what autocast leaves in float32.
        torch.backends.cuda.matmul.allow_tf32 = self.precision == "bf16"
        self.seed(seed)

    # --- processes --------------------------------------------------------------------------------------

    @property
    def partitions_weights(self) -> bool:
        """Whether each process holds only a part of the trained weights, as under ZeRO stage 3 and FSDP."""
        with_stage_3 = self._deepspeed and self._accelerator.state.deepspeed_plugin.zero_stage == 3
        return with_stage_3 or self.fully_sharded

    def _warn_if_bf16_is_slow(self) -> None:
        if self.is_main and not self._warned_of_bf16:
            self._warned_of_bf16 = True
            if warning := slow_bf16_warning(self.device.type):
                _say(warning)

    def seed(self, seed: int) -> None:
        """Seed Python, numpy and torch, differently on every rank."""
        local = seed + 100_003 * self.rank
        random.seed(local)
        np.random.seed(local % 2**32)
        torch.manual_seed(local)

    def check_wait(self, minutes: float, what: str) -> None:
        """Raise ConfigError, naming `what`, if one process may wait for so long that the others give up on it.

        Call it on all processes, before the wait.
        """
        patience = self._config.timeout_minutes
        if self.world_size > 1 and minutes >= patience:
            raise ConfigError(
                f"{what}: a process may wait {minutes:g} minutes, and the others wait for it for "
                f"engine.timeout_minutes={patience:g} only, then the run fails; raise engine.timeout_minutes above "
                f"{minutes:g}, or lower the wait"
            )

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let processes that wait for servers stop together: Interrupted in one of them is raised in all.

        All must enter this context, and none may call another process within it.
        """
        interrupted = False
        try:
            yield
        except Interrupted:
            interrupted = True
        if self.max(interrupted):
            raise Interrupted("the run is to stop, and a server has not answered yet")

    def shard(self, num_rows: int) -> slice:
        """Return this rank's contiguous share of `num_rows` rows, a multiple of the world size."""
        if num_rows % self.world_size:
            raise ValueError(f"{num_rows} rows do not divide over {self.world_size} processes")
        share = num_rows // self.world_size
        return slice(self.rank * share, (self.rank + 1) * share)

    # --- training ---------------------------------------------------------------------------------------

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Wrap for DDP, DeepSpeed or one process. Call the returned module where gradients are wanted."""
        self._note_weights(module)
        self.hold_frozen(module)
        if self.fully_sharded:
            fsdp = self._accelerator.state.fsdp_plugin
            fsdp.transformer_cls_names_to_wrap = fully_sharded.layer_classes(module)
            module.forward = convert_outputs_to_fp32(self.autocast()(module.forward))
        self._module, self.optimizer = self._accelerator.prepare(module, optimizer)
        return self._module

    @property
    def casts_weights(self) -> bool:
        """Whether `prepare` turns the trained module's weights to bf16, as DeepSpeed does."""
        return self._deepspeed and self.precision == "bf16"

    def hold_frozen(self, module: nn.Module) -> None:
        """Give the frozen weights of a module in training the precision that they have there, as `prepare` does.

        Layers that are chosen for it (`drpo.models.four_bit`) go to the device in 4 bits, rounded so before.
        """
        if self.casts_weights:
            for parameter in module.parameters():  # not buffers: DeepSpeed leaves rotary frequencies float32
                if not parameter.requires_grad and parameter.is_floating_point():
                    parameter.data = parameter.data.to(torch.bfloat16)
        elif self.precision == "bf16":
            round_frozen(module)
        four_bit.quantise(module, self.device)

    def place(self, module: nn.Module, as_trained: bool, on_host: bool = False) -> nn.Module:
        """Move a frozen model to the device, its matrices in the run's precision.

        `as_trained` gives it the precision of the trained module, for forwards under `autocast`; without it forwards
        run under `frozen_autocast`, with the same numbers under every launcher. With `on_host` it stays in the host's
        memory, and forwards run within `on_device`.
        """
        self._note_weights(module)
        module.requires_grad_(False)
        if as_trained:
            self.hold_frozen(module)
        elif self.precision == "bf16":
            round_frozen(module)
        if not on_host:
            module.to(self.device)
        elif self.device.type == "cuda":
            for tensor in _tensors(module):
                tensor.data = tensor.data.pin_memory()
        return module.eval()

    @contextmanager
    def on_device(self, module: nn.Module) -> Iterator[None]:
        """Bring a frozen model that was left on the host to the device within this context."""
        tensors = [tensor for tensor in _tensors(module) if tensor.device.type != self.device.type]
        on_host = [tensor.data for tensor in tensors]
        for tensor in tensors:
            tensor.data = tensor.data.to(self.device, non_blocking=True)
        try:
            yield
        finally:
            for tensor, data in zip(tensors, on_host, strict=True):
                tensor.data = data

    def partition(self, module: nn.Module, on_host: bool = False) -> None:
        """Cut a frozen model's weights over the processes under ZeRO stage 3 or FSDP, gathered by layer in a forward.

        All processes must then call `module` itself equally often; under other launchers nothing changes. Under
        ZeRO-3 with `on_host` the parts stay in the host's memory.
        """
        if self.fully_sharded:
            fully_sharded.shard_frozen(module)
            return
        if not self.partitions_weights:
            return
        import deepspeed

        plugin = self._accelerator.state.deepspeed_plugin
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": dict(plugin.deepspeed_config["zero_optimization"]),
        }
        if on_host:
            settings["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": True}
        deepspeed.initialize(model=module, config=settings)

    def _note_weights(self, module: nn.Module) -> None:
        """Warn of slow bf16 if weights are bf16, which are multiplied in bf16 regardless of autocast."""
        if any(weight.dtype == torch.bfloat16 for weight in module.parameters()):
            self._warn_if_bf16_is_slow()

    def autocast(self):
        """Return a context with the precision of training forwards, for parts of the prepared module on their own."""
        return self._accelerator.autocast()

    def frozen_autocast(self):
        """Return a context for forwards of frozen models: bf16 products in a bf16 run, under DeepSpeed too."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate gradients; `last` marks the last micro-batch of the optimizer step."""
        self._accelerator.gradient_state._set_sync_gradients(last)
        self._accelerator.backward(loss)

    def accumulating(self, last: bool):
        """Return a context for forward and backward of a micro-batch; gradients are synchronised at the last only."""
        # FSDP: gradients kept until the last micro-batch would be whole on every process.
        synchronised = last or self.fully_sharded
        return nullcontext() if synchronised else self._accelerator.no_sync(self._module)

    def optimizer_step(self) -> float:
        """Clip, step, clear gradients. Returns the global gradient norm before clipping."""
        if self._deepspeed:  # the step was taken in backward(last=True)
            return float(self._accelerator.deepspeed_engine_wrapped.get_global_grad_norm() or 0.0)
        limit = float("inf") if self._max_grad_norm is None else self._max_grad_norm
        norm = self._accelerator.clip_grad_norm_(self._module.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    @torch.no_grad()
    def reset_optimizer(self, group: int | None = None) -> None:
        """Reset the moments and the step count of one parameter group, or of all, as before the first step."""
        outer = self.optimizer.optimizer
        # DeepSpeed's ZeRO wraps the one that was prepared.
        optimizer = getattr(outer, "optimizer", outer)
        if group is None:
            states = list(optimizer.state.values())
        else:
            parameters = optimizer.param_groups[group]["params"]
            if hasattr(outer, "sub_group_to_group_id"):  # ZeRO-3 empties the groups between its own steps
                flat = enumerate(outer.fp32_partitioned_groups_flat)
                parameters = [part for i, part in flat if outer.sub_group_to_group_id[i] == group]
            states = [optimizer.state[parameter] for parameter in parameters if parameter in optimizer.state]
        for state in states:
            for name, value in state.items():
                state[name] = value.zero_() if isinstance(value, Tensor) else 0

    def loss_scale(self) -> int:
        """Return the factor for a loss that is a share of a global sum, since gradients are averaged over ranks."""
        return self.world_size

    @contextmanager
    def whole_weights(self, module: nn.Module) -> Iterator[None]:
        """Gather all weights of `module` on every rank within this context, if they are partitioned."""
        if self.fully_sharded:
            with fully_sharded.gathered(module):
                yield
            return
        if not self.partitions_weights:
            yield
            return
        import deepspeed

        # Gathered by hand: DeepSpeed's forward hooks would release the weights again module by module.
        optimizer = self._module.optimizer
        offload = getattr(optimizer, "parameter_offload", optimizer)
        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            offload._remove_module_hooks()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield
            finally:
                offload.setup_zero_stage3_hooks()

    def whole_parameters(self, parameters: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Return a context in which these parameters have all their values on every rank, to be read.

        All ranks must ask for the same ones, outside `whole_weights`. A no-op except under ZeRO stage 3; under FSDP
        `whole_tensor` reads them.
        """
        if self.fully_sharded or not self.partitions_weights:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the full weights of the prepared module on the main process; other ranks may get an empty dict."""
        return self._accelerator.get_state_dict(self._module)

    # --- collectives ------------------------------------------------------------------------------------

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Concatenate equal-shaped row tensors of all ranks, in rank order, on every rank."""
        return rows if self.world_size == 1 else self._accelerator.gather(rows.contiguous())

    def gather_objects(self, objects: Sequence[Any]) -> list[Any]:
        """Concatenate lists of picklable objects of all ranks, in rank order, on every rank."""
        return list(objects) if self.world_size == 1 else gather_object(list(objects))

    def from_main(self, value: Any) -> Any:
        """Return the main process's `value`, which must be picklable, on every rank."""
        return self.gather_objects([value])[0]

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks."""
        return value if self.world_size == 1 else self._accelerator.reduce(value, reduction="sum")

    def max(self, value: float) -> float:
        """Return the maximum of a number over ranks."""
        local = torch.tensor([float(value)], device=self.device, dtype=torch.float32)
        return float(self.gather_rows(local).max())

    def barrier(self) -> None:
        self._accelerator.wait_for_everyone()

    # --- state and trackers -----------------------------------------------------------------------------

    def save_state(self, folder: Path) -> None:
        """Save weights, optimizer and the random state of every rank to a folder shared by all ranks."""
        self._accelerator.save_state(str(folder))

    def keep_in_state(self, module: nn.Module) -> None:
        """Include `module` in `save_state` and `load_state`: a changing model outside the prepared one."""
        self._accelerator.register_for_checkpointing(module)

    def load_state(self, folder: Path) -> None:
        self._accelerator.load_state(str(folder))

    def start_trackers(self, config: dict[str, Any]) -> None:
        if self._config.trackers:
            flat = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in config.items()}
            self._accelerator.init_trackers(self._config.project, config=flat)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._accelerator.log(metrics, step=step)

    def at_close(self, function: Callable[[], None]) -> None:
        """Call `function` in `close`, before the process group is left; it may leave the group itself."""
        self._at_close.append(function)

    def close(self) -> None:
        """Flush the trackers and leave the process group."""
        for tracker in self._accelerator.trackers:
            tracker.finish()
        distributed = torch.distributed.is_available()
        if distributed and torch.distributed.is_initialized():
            torch.distributed.barrier()
            # gloo: its thread may need the GIL to release the tensors of the last collective, and the group's
            # destructor holds the GIL while it waits for that thread.
            time.sleep(SETTLE_SECONDS)
        for function in self._at_close:
            function()
        if distributed and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@contextmanager
def engine_of(recipe: Any) -> Iterator[Engine]:
    """Open the engine of a training recipe; the next one of this process may have another precision."""
    run_dir, max_grad_norm = Path(recipe.run_dir), recipe.optim.max_grad_norm
    try:
        engine = Engine(recipe.engine, run_dir, recipe.seed, max_grad_norm)
        if engine.fully_sharded:
            fully_sharded.check_recipe(recipe)
        if recipe.model.load_in_4bit:
            four_bit.check_run(engine.partitions_weights)
        yield engine
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
