"""Time the steps of a TRL trainer for launch/experiments/speed.py: DPO, SFT, reward model or PPO.

    python launch/experiments/speed_trl.py job.json

TRL runs in the fastest way that its documentation gives for plain PyTorch: no gradient checkpointing, no evaluation, no
logging, no saving. It gets the rows in the order of the file. The result is written to the job's `result`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parents[1])

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

from drpo.run.metrics import peak_memory_gib

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Clock(TrainerCallback):
    """Times at which training began and every step ended, the peak memory until then, and seconds of sampling."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.sampling: list[float] = []
        self.peak_memory_gib = 0.0

    def on_train_begin(self, *_, **__) -> None:
        self.times.append(now())

    def on_step_end(self, *_, **__) -> None:
        self.times.append(now())
        self.peak_memory_gib = max(self.peak_memory_gib, peak_memory_gib(DEVICE))

    def steps(self) -> list[float]:
        """Return the seconds of every step."""
        return [end - start for start, end in zip(self.times, self.times[1:], strict=False)]


def now() -> float:
    """Return the time at which all that was asked of the device is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train, and return the seconds of every part of every step, the losses of the steps, and the peak memory."""
    clock = Clock()
    quiet = {
        "gradient_checkpointing": False,
        "lr_scheduler_type": "constant",
        "use_cpu": DEVICE.type == "cpu",
        "report_to": [],
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    arguments = {**quiet, **job["arguments"]}
    trainer = _ppo(job, arguments, clock) if job["stage"] == "drpo" else _offline(job, arguments, clock)
    trainer.train()
    seconds = {"step": clock.steps()}
    if clock.sampling:
        seconds["generate"] = clock.sampling
        seconds["learn"] = [
            step - sampling for step, sampling in zip(seconds["step"], clock.sampling, strict=True)
        ]
    return {
        "seconds": seconds,
        "losses": _step_losses(trainer, job) if job["stage"] != "drpo" else [],
        "peak_memory_gib": clock.peak_memory_gib,
    }


def _language_model(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def _scalar_model(folder: str):
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype="float32")


def _offline(job: dict[str, Any], arguments: dict[str, Any], clock: Clock):
    """Build a trainer of TRL 1.16 that records the loss of every forward."""
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    match job["stage"]:
        case "dpo":
            config, base = DPOConfig, DPOTrainer
            models = {"model": _language_model(job["policy"]), "ref_model": _language_model(job["policy"])}
        case "reward_model":
            config, base = RewardConfig, RewardTrainer
            models = {"model": _scalar_model(job["reward_model"])}
        case "sft":
            config, base = SFTConfig, SFTTrainer
            models = {"model": _language_model(job["policy"])}

    class RecordingTrainer(base):
        recorded: list[torch.Tensor] = []

        def compute_loss(self, *args, **options):
            loss = super().compute_loss(*args, **options)
            self.recorded.append(loss.detach())
            return loss

    args = config(**arguments, max_length=None, train_sampling_strategy="sequential")
    rows = load_dataset("json", data_files=job["rows"], cache_dir=args.output_dir, split="train")
    tokenizer = AutoTokenizer.from_pretrained(job["policy"])
    return RecordingTrainer(
        **models, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=[clock]
    )


def _step_losses(trainer, job: dict[str, Any]) -> list[float]:
    """Return the loss of every step: the micro-batches of SFT are shares of it, those of the others means."""
    parts = torch.stack(trainer.recorded).view(-1, job["arguments"]["gradient_accumulation_steps"])
    return (parts.sum(dim=1) if job["stage"] == "sft" else parts.mean(dim=1)).tolist()


def _ppo(job: dict[str, Any], arguments: dict[str, Any], clock: Clock):
    """Build the PPO trainer of TRL 1.12, and time its sampling."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    sample = ppo_trainer.batch_generation

    def timed(*args, **options):
        start = now()
        sampled = sample(*args, **options)
        clock.sampling.append(now() - start)
        return sampled

    ppo_trainer.batch_generation = timed
    tokenizer = AutoTokenizer.from_pretrained(job["policy"], padding_side="left")
    rows = load_dataset("json", data_files=job["rows"], cache_dir=arguments["output_dir"], split="train")
    rows = rows.map(
        lambda row: {"input_ids": tokenizer(row["prompt"]).input_ids}, remove_columns=rows.column_names
    )
    return PPOTrainer(
        args=PPOConfig(**arguments, num_sample_generations=0),
        processing_class=tokenizer,
        model=_language_model(job["policy"]),
        ref_model=_language_model(job["policy"]),
        reward_model=_scalar_model(job["reward_model"]),
        value_model=_scalar_model(job["reward_model"]),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[clock],
    )


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job["result"]).write_text(json.dumps(run(job)))
