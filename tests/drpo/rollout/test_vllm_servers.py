"""Rollouts by servers, over real sockets, as far as it is decided without vLLM: weights, versions, rows, failures."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from online_runs import RECIPE, forget_precision, merged
from stub_rollout_server import StubRolloutServer
from tiny_models import tiny_model

from drpo.config import ConfigError, make_section
from drpo.engine import Engine, EngineConfig
from drpo.models.adapters import add_lora
from drpo.models.scoring import response_logprobs
from drpo.rollout.generator import Generator
from drpo.rollout.sampler import SamplingConfig, Vocabulary
from drpo.rollout.vllm_requests import VLLMConfig
from drpo.rollout.vllm_servers import VLLMServers
from drpo.rollout.vllm_worker import WorkerExtension
from drpo.rollout.weight_stream import WeightListener
from drpo.tensors import pad_batch
from drpo.trainers.online_recipe import OnlineRecipe

PAD, STOP, SUPPRESSED = 2, 1, (2, 40)
TEMPERATURE = 0.7
CONTEXTS = [[5, 6, 7], [5, 6, 7, 8], [9], [10, 11, 12], [13, 14]]
BUDGETS = [6, 5, 4, 0, 7]
DRAWS = [(3, number) for number in range(len(CONTEXTS))]


@pytest.fixture
def engine(tmp_path):
    forget_precision()
    engine = Engine(EngineConfig(mixed_precision="no", trackers=[]), tmp_path, 0, None)
    yield engine
    engine.close()


def plain() -> torch.nn.Module:
    return tiny_model("gpt_neox")


@pytest.fixture
def policy() -> torch.nn.Module:
    return add_lora(plain(), r=2, alpha=4.0, target_modules=None, seed=0)


def generator_of(policy, engine, *urls: str, timeout: float = 30.0, address: str | None = None) -> Generator:
    config = VLLMConfig(urls=list(urls), timeout_minutes=timeout / 60, address=address)
    vocabulary = Vocabulary(PAD, (STOP,), SUPPRESSED)
    servers = VLLMServers(config, engine, vocabulary, 4, 20)
    return Generator(policy, None, vocabulary, SamplingConfig(temperature=TEMPERATURE), 8, 4, vllm=servers)


def update(policy: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight += 0.3 * torch.randn(weight.shape, generator=generator)


def trainers_logprobs(policy, tokens) -> torch.Tensor:
    rows = [row for row, ids in enumerate(tokens) if ids]
    batch = pad_batch([CONTEXTS[row] for row in rows], [tokens[row] for row in rows], PAD)
    with torch.no_grad():
        found = response_logprobs(policy, batch, temperature=TEMPERATURE, suppressed_ids=SUPPRESSED).logprobs
    return torch.cat([found[place, : len(tokens[row])] for place, row in enumerate(rows)])


@pytest.mark.parametrize("num_workers", [1, 3])
def test_every_worker_of_every_server_has_the_policy_after_each_update(policy, engine, num_workers):
    with StubRolloutServer(plain(), num_workers) as first, StubRolloutServer(plain()) as second:
        generator = generator_of(policy, engine, first.url, second.url)
        for seed in range(3):
            with generator.synced():
                found = generator.generate(CONTEXTS, BUDGETS, DRAWS, logprobs=True)
            values = torch.tensor([value for row in found.logprobs for value in row])
            torch.testing.assert_close(values, trainers_logprobs(policy, found.tokens), atol=2e-5, rtol=0)
            update(policy, seed)
        stale = trainers_logprobs(policy, found.tokens)
    assert (stale - values).abs().mean() > 0.1, "the same check sees weights that did not arrive"
    assert first.num_resets == second.num_resets == 3, "keys and values of earlier weights are forgotten"


def test_rows_keep_their_order_and_neighbours_go_to_one_server(policy, engine):
    with StubRolloutServer(plain()) as alone:
        generator = generator_of(policy, engine, alone.url)
        with generator.synced():
            expected = generator.generate(CONTEXTS, BUDGETS, DRAWS)
    with StubRolloutServer(plain()) as first, StubRolloutServer(plain()) as second:
        generator = generator_of(policy, engine, first.url + "/", second.url)
        with generator.synced():
            found = generator.generate(CONTEXTS, BUDGETS, DRAWS)
            assert generator.generate([], [], []).tokens == []
    assert found == expected and found.tokens[3] == [] and found.logprobs[3] == []
    assert all(len(ids) <= budget for ids, budget in zip(found.tokens, BUDGETS, strict=True))
    assert sorted(first.rows) == sorted(CONTEXTS[:2]) and sorted(second.rows) == sorted(
        [CONTEXTS[2], CONTEXTS[4]]
    )


def test_a_server_that_another_run_took_stops_the_run(policy, engine):
    with StubRolloutServer(plain()) as server:
        generator = generator_of(policy, engine, server.url)
        other = generator_of(policy, engine, server.url)
        with generator.synced():
            generator.generate(CONTEXTS, BUDGETS, DRAWS)
            with other.synced(), pytest.raises(ConfigError, match=f"{server.url} sampled with other weights"):
                generator.generate(CONTEXTS, BUDGETS, DRAWS)


def test_a_server_that_comes_back_without_the_weights_stops_the_run(policy, engine):
    with StubRolloutServer(plain()) as server:
        generator = generator_of(policy, engine, server.url)
        with generator.synced():
            generator.generate(CONTEXTS, BUDGETS, DRAWS)
    port = int(server.url.rpartition(":")[2])
    started = []

    def start_again() -> None:
        time.sleep(0.3)
        started.append(StubRolloutServer(plain(), port=port).__enter__())

    again = threading.Thread(target=start_again)
    again.start()
    try:
        with pytest.raises(ConfigError, match=r"other weights than this run has sent \(default, not"):
            generator.generate(CONTEXTS, BUDGETS, DRAWS)
    finally:
        again.join()
        started[0].__exit__()


def test_a_run_waits_for_a_server_that_starts_late(policy, engine):
    with StubRolloutServer(plain()) as server:
        port = int(server.url.rpartition(":")[2])
    late = StubRolloutServer.__new__(StubRolloutServer)
    starting = threading.Timer(0.5, lambda: late.__init__(plain(), port=port) or late.__enter__())
    starting.start()
    generator = generator_of(policy, engine, server.url)
    with generator.synced():
        assert len(generator.generate(CONTEXTS, BUDGETS, DRAWS).tokens) == len(CONTEXTS)
    late.__exit__()


def test_a_server_that_stays_away_is_named_with_how_long_it_was_waited_for(policy, engine):
    with StubRolloutServer(plain()) as server:
        generator = generator_of(policy, engine, server.url, timeout=1.2)
        with generator.synced():
            pass
    message = f"rollout.vllm.urls: {server.url} does not answer /inference/v1/generate"
    with pytest.raises(ConfigError, match=message + r" \(waited rollout.vllm.timeout_minutes=0.02"):
        generator.generate(CONTEXTS, BUDGETS, DRAWS)
    before = time.monotonic()
    with (
        pytest.raises(ConfigError, match=f"{server.url} does not answer /get_world_size .waited"),
        generator.synced(),
    ):
        pass
    assert time.monotonic() - before > 0.2, "it was waited for"
    with pytest.raises(ConfigError, match=f"{server.url} does not answer /health"):
        generator_of(policy, engine, server.url, timeout=1.2)


def test_a_server_that_is_busy_is_asked_again(policy, engine):
    with StubRolloutServer(plain()) as server:
        generator = generator_of(policy, engine, server.url)
        with generator.synced():
            server.failures["/inference/v1/generate"] = 503
            over = threading.Timer(0.5, server.failures.clear)
            over.start()
            assert len(generator.generate(CONTEXTS, BUDGETS, DRAWS).tokens) == len(CONTEXTS)


@pytest.mark.parametrize(
    "path, named",
    [("/collective_rpc", "weights"), ("/inference/v1/generate", "rows"), ("/server_info", "start")],
)
def test_errors_of_a_server_are_shown_at_once(policy, engine, path, named):
    with StubRolloutServer(plain()) as server:
        server.failures[path] = 500
        with pytest.raises(ConfigError, match=f"{server.url}{path} answers 500: out of order"):
            generator = generator_of(policy, engine, server.url)
            with generator.synced():
                generator.generate(CONTEXTS, BUDGETS, DRAWS)


@pytest.mark.parametrize(
    "started, message",
    [
        ({"dtype": "torch.bfloat16"}, "torch.bfloat16, and for engine.mixed_precision=no the dtype must be .*32"),
        ({"logprobs_mode": "raw_logprobs"}, "raw_logprobs, and logprobs_mode must be processed_logprobs"),
        ({"max_model_len": 19}, "takes 19 tokens, .* start it with --max-tokens 20"),
    ],
)  # fmt: skip
def test_a_server_started_otherwise_is_refused(policy, engine, started, message):
    with StubRolloutServer(plain(), **started) as server, pytest.raises(ConfigError, match=message):
        generator_of(policy, engine, server.url)


def test_a_server_without_the_extension_is_refused(policy, engine):
    with StubRolloutServer(plain()) as server:
        server.config = server.config | {"parallel_config": {"worker_extension_cls": ""}}
        with pytest.raises(
            ConfigError, match="runs with none, and the worker extension must be drpo.rollout"
        ):
            generator_of(policy, engine, server.url)


@pytest.mark.parametrize(
    "vllm, message",
    [
        ({"urls": ["gpu1:8000"]}, r"rollout.vllm.urls \(gpu1:8000\) must be http://host:port"),
        ({"urls": ["http://a:1", "http://a:1/"]}, "rollout.vllm.urls names a server twice"),
        (
            {"urls": ["http://a:1"], "enforce_eager": True},
            "rollout.vllm.enforce_eager is for vLLM in the training",
        ),
        (
            {"urls": ["http://a:1"], "kv_cache_gib": 2.0},
            "rollout.vllm.kv_cache_gib is for vLLM in the training",
        ),
        ({"address": "10.0.0.1"}, r"rollout.vllm.address is for servers, and rollout.vllm.urls is \[\]"),
        ({"urls": ["http://a:1"], "timeout_minutes": 0.0}, "rollout.vllm.timeout_minutes must be > 0"),
    ],
)
def test_settings_that_do_not_apply_are_refused(vllm, message):
    with pytest.raises(ConfigError, match=message):
        make_section(OnlineRecipe, merged(RECIPE, {"rollout": {"engine": "vllm", "vllm": vllm}}))


def test_a_whole_run_samples_from_a_server(online_run, policy_folder):
    from transformers import AutoModelForCausalLM

    with StubRolloutServer(
        AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
    ) as server:
        rows, _ = online_run(rollout={"engine": "vllm", "vllm": {"urls": [server.url]}})
    assert len(rows) == 3
    assert all(row["rollout/logprob_difference"] < 1e-5 for row in rows)
    assert server.num_resets == 3


def test_rows_that_a_stopping_server_cuts_off_stop_the_run(policy, engine):
    with StubRolloutServer(plain()) as server:
        generator = generator_of(policy, engine, server.url)
        server.finish_reason = "abort"
        with (
            generator.synced(),
            pytest.raises(ConfigError, match="ended a row before its end .finish_reason abort"),
        ):
            generator.generate(CONTEXTS, BUDGETS, DRAWS)


def test_all_servers_begin_at_once(policy, engine):
    """More rows than threads: none of the servers waits for the rows of another."""
    order = []

    class Recording(list):
        def __init__(self, name: str) -> None:
            self.name = name

        def append(self, context) -> None:
            order.append(self.name)
            super().append(context)

    with StubRolloutServer(plain()) as first, StubRolloutServer(plain()) as second:
        first.rows, second.rows = Recording("first"), Recording("second")
        generator = generator_of(policy, engine, first.url, second.url)
        contexts = [[row + 5] for row in range(40)]
        with generator.synced():
            found = generator.generate(contexts, [2] * 40, [(3, row) for row in range(40)])
    assert order[:20].count("first") >= 5 and order[:20].count("second") >= 5
    assert sorted(first.rows) == contexts[:20] and sorted(second.rows) == contexts[20:]
    with StubRolloutServer(plain()) as alone:
        generator = generator_of(policy, engine, alone.url)
        with generator.synced():
            assert generator.generate(contexts, [2] * 40, [(3, row) for row in range(40)]) == found


def test_an_address_that_is_not_this_machines_is_named_by_its_key(policy, engine):
    with StubRolloutServer(plain()) as server:
        generator = generator_of(policy, engine, server.url, address="203.0.113.1")
        with pytest.raises(
            ConfigError, match="rollout.vllm.address: this machine cannot offer .* at 203.0.113.1"
        ):
            generator.synced().__enter__()
        generator = generator_of(policy, engine, server.url, address="127.0.0.1")
        with generator.synced():
            assert generator.generate(CONTEXTS, BUDGETS, DRAWS).tokens[0]


def test_workers_that_never_come_are_waited_for_and_told_where_to_look(policy, engine):
    with StubRolloutServer(plain(), num_workers=1) as server:
        generator = generator_of(policy, engine, server.url, timeout=2.5)
        server.waits = 4.0
        with pytest.raises(
            ConfigError, match=r"offered at 127.0.0.1 port \d+, were not fetched: .*rollout.vllm.address, any"
        ):
            generator.synced().__enter__()


def test_the_key_of_the_servers_is_sent(policy, engine, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with StubRolloutServer(plain()) as server:
        generator_of(policy, engine, server.url)
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}


def test_a_worker_whose_transfer_was_cut_off_takes_no_other():
    class Worker(WorkerExtension):
        def reload_weights(self, weights_iterator) -> None:
            self.loaded = dict(weights_iterator)

    worker = Worker()
    with WeightListener("127.0.0.1") as listener:
        broken = threading.Thread(target=lambda: listener.accept(1, 10.0, lambda: None)[0].close())
        broken.start()
        with pytest.raises(ConnectionError):
            worker.fetch_weights(listener.address, listener.port, listener.token, 5.0)
        broken.join()
        with pytest.raises(RuntimeError, match="cut off: restart this server"):
            worker.fetch_weights(listener.address, listener.port, listener.token, 5.0)
