"""Weights over a real socket: nothing is lost, nobody else gets them, and an end before the end is an error."""

from __future__ import annotations

import socket
import threading
import time

import pytest
import torch

from drpo.rollout.weight_stream import WeightListener, fetch_weights, send_weights

WEIGHTS = {
    "embedding": torch.arange(600_000, dtype=torch.float32).reshape(1000, 600) / 7,
    "transposed": torch.arange(12.0).reshape(3, 4).T,
    "scale": torch.tensor(3.5),
    "positions": torch.tensor([5, 2**40], dtype=torch.int64),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
}


def fetched(listener: WeightListener, token: str | None = None, number: int = 1) -> tuple[list, list]:
    results: list[object] = []

    def fetch() -> None:
        try:
            results.append(
                dict(fetch_weights(listener.address, listener.port, token or listener.token, 10.0))
            )
        except OSError as error:
            results.append(error)

    threads = [threading.Thread(target=fetch) for _ in range(number)]
    for thread in threads:
        thread.start()
    return results, threads


def nothing() -> None:
    pass


@pytest.mark.parametrize("number", [1, 3])
def test_every_worker_gets_every_weight_bit_for_bit(number):
    with WeightListener("127.0.0.1") as listener:
        results, threads = fetched(listener, number=number)
        send_weights(listener.accept(number, 10.0, nothing), WEIGHTS.items(), torch.float32)
        for thread in threads:
            thread.join()
    assert len(results) == number
    for weights in results:
        assert list(weights) == list(WEIGHTS)
        for name, weight in WEIGHTS.items():
            expected = weight.float() if weight.is_floating_point() else weight
            assert weights[name].dtype == expected.dtype and torch.equal(weights[name], expected)


def test_floating_weights_are_rounded_before_they_travel():
    with WeightListener("127.0.0.1") as listener:
        results, [thread] = fetched(listener)
        send_weights(listener.accept(1, 10.0, nothing), WEIGHTS.items(), torch.bfloat16)
        thread.join()
    # bfloat16 has 8 significant bits: 1/7 = 0.142857... lies between 0.142578125 and 0.1435546875.
    assert float(results[0]["embedding"][0, 1]) == 0.142578125
    assert results[0]["positions"].tolist() == [5, 2**40]


def test_strangers_are_turned_away_and_do_not_hold_up_the_workers():
    with WeightListener("127.0.0.1") as listener:
        refused, [stranger] = fetched(listener, token="0" * len(listener.token))
        silent = socket.create_connection((listener.address, listener.port))
        stranger_done = []

        def later() -> None:
            time.sleep(0.2)
            stranger_done.extend(fetched(listener))

        starting = threading.Thread(target=later)
        starting.start()
        connections = listener.accept(1, 10.0, nothing)
        send_weights(connections, WEIGHTS.items(), torch.float32)
        starting.join()
        results, [thread] = stranger_done
        thread.join()
        stranger.join()
        silent.close()
    assert isinstance(refused[0], ConnectionError) and torch.equal(results[0]["scale"], WEIGHTS["scale"])


def test_waiting_ends_by_time_or_by_a_reason():
    with WeightListener("127.0.0.1") as listener:
        with pytest.raises(TimeoutError, match="0 of 2 workers asked for the weights within 0 s"):
            listener.accept(2, 0.1, nothing)

        def failed() -> None:
            raise RuntimeError("the server has failed")

        with pytest.raises(RuntimeError, match="the server has failed"):
            listener.accept(2, 60.0, failed)


def test_weights_that_end_early_are_an_error_of_the_worker():
    def broken():
        yield from list(WEIGHTS.items())[:2]
        raise RuntimeError("the trainer has failed")

    with WeightListener("127.0.0.1") as listener:
        results, [thread] = fetched(listener)
        connections = listener.accept(1, 10.0, nothing)
        with pytest.raises(RuntimeError, match="the trainer has failed"):
            send_weights(connections, broken(), torch.float32)
    thread.join()
    assert isinstance(results[0], ConnectionError) and "before all weights" in str(results[0])


def test_an_address_that_is_not_this_machines_is_an_error():
    with pytest.raises(OSError):
        WeightListener("203.0.113.1")
