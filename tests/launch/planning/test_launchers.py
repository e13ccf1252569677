"""What an accelerate config says on how a run is divided."""

from __future__ import annotations

import json

import pytest
import yaml

from drpo.config import ConfigError
from launch.cli import accelerate_config
from launch.planning.launchers import read_launcher
from launch.planning.sharding import Sharding


@pytest.mark.parametrize(
    ("name", "sharding", "deepspeed"),
    [
        ("single_gpu", Sharding(1), False),
        ("multi_gpu", Sharding(8), False),
        ("multi_node", Sharding(16), False),
        ("zero2", Sharding(8, 2), True),
        ("zero3", Sharding(8, 3), True),
        ("zero3_offload", Sharding(8, 3, offload_optimizer=True), True),
    ],
)
def test_shipped_configs_are_read_for_eight_gpus(name, sharding, deepspeed):
    launcher = read_launcher(accelerate_config(name), 8)
    assert (launcher.sharding, launcher.deepspeed, launcher.precision) == (sharding, deepspeed, "bf16")


def write(path, **config):
    path.write_text(yaml.safe_dump(config))
    return path


def test_offload_is_read_from_the_config(tmp_path):
    settings = {"zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "cpu"}
    path = write(tmp_path / "mine.yaml", distributed_type="DEEPSPEED", deepspeed_config=settings)
    launcher = read_launcher(path, 2)
    assert launcher.sharding == Sharding(2, 3, offload_optimizer=True, offload_weights=True)
    assert (launcher.name, launcher.precision) == ("mine", "no")


def test_deepspeed_config_file_is_read(tmp_path):
    content = {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    }
    (tmp_path / "ds.json").write_text(json.dumps(content))
    settings = {"deepspeed_config_file": str(tmp_path / "ds.json")}
    path = write(tmp_path / "mine.yaml", distributed_type="DEEPSPEED", deepspeed_config=settings)
    launcher = read_launcher(path, 2)
    assert (launcher.sharding, launcher.precision) == (Sharding(2, 2, offload_optimizer=True), "bf16")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"distributed_type": "MULTI_GPU", "use_cpu": True}, "mine runs on CPUs"),
        ({"distributed_type": "FSDP"}, "distributed_type FSDP; a plan knows"),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "nowhere.json"}},
            "nowhere.json, which is not there",
        ),
    ],
)
def test_config_that_cannot_be_sized_is_refused(tmp_path, config, message):
    with pytest.raises(ConfigError, match=message):
        read_launcher(write(tmp_path / "mine.yaml", **config), 8)
