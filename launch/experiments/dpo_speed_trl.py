"""Time the DPO steps of launch/experiments/dpo_speed.py with TRL's DPOTrainer.

    python launch/experiments/dpo_speed_trl.py job.json

TRL runs in the fastest way that its documentation gives for plain PyTorch: no gradient checkpointing, no evaluation, no
logging, no saving. It gets the pairs in the order of the file. The result is written to the job's `result`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parents[1])

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from drpo.run.metrics import peak_memory_gib

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Clock(TrainerCallback):
    """Times at which training began and every optimizer step ended, and the peak memory until then."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.peak_memory_gib = 0.0

    def on_train_begin(self, *_, **__) -> None:
        self.times.append(time.perf_counter())

    def on_step_end(self, *_, **__) -> None:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        self.peak_memory_gib = max(self.peak_memory_gib, peak_memory_gib(DEVICE))


def run(job: dict) -> dict[str, list[float] | float]:
    """Train, and return seconds and loss of every step and the peak memory."""
    from trl import DPOConfig, DPOTrainer

    losses: list[torch.Tensor] = []

    class RecordingTrainer(DPOTrainer):
        def compute_loss(self, *arguments, **options):
            loss = super().compute_loss(*arguments, **options)
            losses.append(loss.detach())
            return loss

    def load():
        return AutoModelForCausalLM.from_pretrained(
            job["policy"], dtype="float32", attn_implementation=job["attn_implementation"]
        )

    clock = Clock()
    arguments = DPOConfig(
        **job["arguments"],
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        use_cpu=DEVICE.type == "cpu",
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = RecordingTrainer(
        model=load(),
        ref_model=None if arguments.precompute_ref_log_probs else load(),
        args=arguments,
        train_dataset=load_dataset(
            "json", data_files=job["pairs"], cache_dir=arguments.output_dir, split="train"
        ),
        processing_class=AutoTokenizer.from_pretrained(job["policy"]),
        callbacks=[clock],
    )
    trainer.train()
    steps = torch.stack(losses).view(-1, arguments.gradient_accumulation_steps).mean(dim=1)
    return {
        "seconds": [end - start for start, end in zip(clock.times, clock.times[1:], strict=False)],
        "losses": steps.tolist(),
        "peak_memory_gib": clock.peak_memory_gib,
    }


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job["result"]).write_text(json.dumps(run(job)))
