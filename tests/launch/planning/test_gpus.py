"""GPUs by name and size."""

from __future__ import annotations

import pytest

from drpo.config import ConfigError
from launch.planning.gpus import GIB, parse_gpus


@pytest.mark.parametrize(
    ("text", "count", "capacity"),
    [
        ("8xH100", 8, 79.1 * GIB),
        ("l4", 1, 22.0 * GIB),
        ("2xA100-40", 2, 39.4 * GIB),
        ("RTX 4090", 1, 23.5 * GIB),
        ("8x80", 8, 80e9),
        ("1x24GB", 1, 24e9),
    ],
)
def test_number_and_name_or_size_are_read(text, count, capacity):
    gpus = parse_gpus(text)
    assert (gpus.count, gpus.capacity) == (count, pytest.approx(capacity))


def test_context_communication_and_fragments_are_not_usable():
    """0.95 * (80e9 - 0.75 GiB), and 0.5 GiB less where several GPUs talk."""
    assert parse_gpus("80").usable == pytest.approx(0.95 * (80e9 - 0.75 * GIB))
    assert parse_gpus("2x80").usable == pytest.approx(0.95 * (80e9 - 1.25 * GIB))


@pytest.mark.parametrize("text", ["8xZ100", "0xH100", "x", "", "8x0", "-1xH100", "8 H100"])
def test_unknown_gpus_are_refused_with_the_names(text):
    with pytest.raises(ConfigError, match=r"--gpus: .* unknown; .*8xH100 .*A100-40"):
        parse_gpus(text)
