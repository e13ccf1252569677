"""Bytes per device and host, by hand."""

from __future__ import annotations

from launch.planning.sharding import Sharding, device_memory, host_memory
from launch.planning.sizes import Phase, Weights

PHASES = [
    Phase("rollout", 10, cache=7, gathers_policy=True),
    Phase("update", 30, with_gradients=True),
    Phase("step", 5),
]
ALL_FLOAT = {"policy": Weights(100, 400), "reference": Weights(0, 0, 100, 400)}
ALL_BF16 = {"policy": Weights(100, 200), "reference": Weights(0, 0, 100, 200)}
LORA = {
    "policy": Weights(10, 40, 100, 200),
    "critic": Weights(10, 40, 0, 0, 200),
    "reward model": Weights(0, 0, 50, 100, 100),
}


def test_one_process_holds_everything():
    """Weights 400, reference 400, two moments 800; gradients 400 in update and step alone."""
    phases = device_memory(ALL_FLOAT, PHASES, Sharding(1))
    held = {"policy": 400, "reference": 400, "optimizer": 800}
    assert phases == {
        "rollout": held | {"key-value cache": 7, "activations": 10},
        "update": held | {"activations": 30, "gradients": 400},
        "step": held | {"activations": 5, "gradients": 400},
    }


def test_ddp_holds_buckets_too_and_steps_the_gradients_in_them():
    phases = device_memory(ALL_FLOAT, PHASES, Sharding(8))
    held = {"policy": 400, "reference": 400, "optimizer": 800, "communication": 400}
    assert phases == {
        "rollout": held | {"key-value cache": 7, "activations": 10},
        "update": held | {"activations": 30, "gradients": 400},
        "step": held | {"activations": 5},
    }


def test_zero2_divides_gradients_moments_and_float32_copies():
    """Over 4: copies 100 and moments 200, gradients 100; a bucket of 60 bf16 elements in the update."""
    phases = device_memory(ALL_BF16, PHASES, Sharding(4, 2), bucket=60)
    held = {"policy": 200, "reference": 200, "optimizer": 300}
    assert phases == {
        "rollout": held | {"key-value cache": 7, "activations": 10},
        "update": held | {"activations": 30, "gradients": 100, "communication": 120},
        "step": held | {"activations": 5, "gradients": 100},
    }


def test_zero3_divides_weights_too_and_gathers_the_policy_for_rollouts():
    """The gradients' share stands for the whole step, and is copied for the optimizer."""
    phases = device_memory(ALL_BF16, PHASES, Sharding(4, 3), bucket=60)
    held = {"policy": 50, "reference": 50, "optimizer": 300, "communication": 120, "gradients": 100}
    assert phases == {
        "rollout": held | {"key-value cache": 7, "activations": 10, "gathered weights": 200},
        "update": held | {"activations": 30, "gathered weights": 400, "communication": 240},
        "step": held | {"activations": 5, "gradients": 200},
    }


def test_zero3_divides_what_a_reward_model_shares_elsewhere():
    """A tenth of 100 own and 100 shared bytes; the critic is divided with the policy, and shares its base."""
    phases = device_memory(LORA, PHASES, Sharding(10, 3), bucket=20)
    assert phases["step"]["reward model"] == 20
    assert phases["step"]["critic"] == 4
    assert device_memory(LORA, PHASES, Sharding(10, 2), bucket=20)["step"]["reward model"] == 100


def test_optimizer_on_the_host_leaves_the_device():
    """Host, 4 processes: 12 and 4 bytes of 25 elements each, and 400 of the float32 policy while it loads."""
    sharding = Sharding(4, 2, offload_optimizer=True)
    phases = device_memory(ALL_BF16, PHASES, sharding, bucket=60)
    assert phases["step"] == {"policy": 200, "reference": 200}
    assert phases["update"] == {"policy": 200, "reference": 200, "activations": 30, "communication": 120}
    assert host_memory(ALL_BF16, sharding, 4) == {
        "models while they load": 1600,
        "optimizer": 4 * 300,
        "gradients": 4 * 100,
    }


def test_weights_on_the_host_leave_the_device():
    sharding = Sharding(4, 3, offload_optimizer=True, offload_weights=True)
    phases = device_memory(ALL_BF16, PHASES, sharding, bucket=60)
    assert phases["step"] == {"communication": 120}
    assert host_memory(ALL_BF16, sharding, 2)["weights"] == 2 * 100


def test_share_of_a_process_is_rounded_up():
    weights = {"policy": Weights(101, 202)}
    assert device_memory(weights, PHASES, Sharding(4, 2), bucket=1)["step"]["optimizer"] == 12 * 26


def test_waiting_models_are_on_the_host_outside_their_phase():
    phases = device_memory(ALL_FLOAT, PHASES, Sharding(), waiting={"reference": "update"})
    assert ["reference" in parts for parts in phases.values()] == [False, True, False]
    assert host_memory(ALL_FLOAT, Sharding(2), 2, {"reference"})["reference"] == 2 * 400
    assert host_memory(ALL_FLOAT, Sharding(2, 3), 2, {"reference"})["reference"] == 2 * 200
