"""launch/serve_rollouts.py as far as it goes without vLLM: tests/end_to_end/test_vllm_server.py starts the real one."""

from __future__ import annotations

import importlib.util
import subprocess

import pytest
from tiny_runs import ROOT, finished, plain

from drpo.rollout.vllm_servers import EXTENSION
from launch.serve_rollouts import _parser, arguments


def serve(*arguments: str) -> subprocess.CompletedProcess:
    return finished(plain("serve_rollouts"), *arguments, cwd=ROOT)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_it_says_how_to_install_it():
    done = serve("some/model", "--max-tokens", "64")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "serve_rollouts.py: rollout.engine=vllm needs the package vllm: pip install" in done.stderr


def test_the_length_is_asked_for():
    done = serve("some/model")
    assert done.returncode == 2 and "--max-tokens" in done.stderr


def test_help_says_what_a_reachable_port_means():
    done = serve("--help")
    assert done.returncode == 0 and "read and change the weights" in " ".join(done.stdout.split())


def test_the_model_comes_first():
    done = serve("--max-num-seqs", "64", "policy", "--max-tokens", "9")
    assert done.returncode == 2 and "the model comes first" in done.stderr


def test_the_server_gets_what_a_run_needs():
    options = _parser().parse_args(["policy", "--max-tokens", "64", "--dtype", "float32", "--port", "81"])
    given = " ".join(arguments(options))
    assert given.startswith("--model policy --host 127.0.0.1 --port 81 --max-model-len 64 --dtype float32")
    assert f"--worker-extension-cls {EXTENSION}" in given and "--tokens-only" in given
    assert "--logprobs-mode processed_logprobs" in given and "--load-format dummy" in given
