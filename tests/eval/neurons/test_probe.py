from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model

from drpo.config import ConfigError
from eval.neurons.probe import Probe, fit_probe, load_probe, mean_hidden_states, probe_quality, save_probe

TRUE_FALSE = torch.tensor([True, False])


# --- logistic regression --------------------------------------------------------------------------------


def test_the_optimum_of_two_points_by_hand():
    """x = +-1: 2 log(1 + e^-w) + (l2/2) w^2 is flat where 2 sigmoid(-w) = l2 w; w = 1 needs l2 = 2 / (1 + e)."""
    probe = fit_probe(torch.tensor([[1.0], [-1.0]]), TRUE_FALSE, l2=2 / (1 + math.e))
    assert probe.weight.tolist() == pytest.approx([1.0], abs=1e-9)
    assert probe.bias == pytest.approx(0.0, abs=1e-9)


def test_the_bias_is_free_and_the_weights_are_not():
    """Without information in x only the bias is left: logit of the share of true labels, 3 of 4: log 3."""
    probe = fit_probe(torch.full((4, 2), 7.0), torch.tensor([True, True, True, False]))
    assert probe.bias == pytest.approx(math.log(3), abs=1e-8)
    assert probe.weight.tolist() == pytest.approx([0.0, 0.0], abs=1e-12)


@pytest.mark.parametrize("l2", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("shape", [(40, 3), (10, 25)])  # also more numbers than texts, and separable
def test_the_gradient_is_zero_at_the_optimum(shape, l2):
    """Checked by loops over the definition, on features far from centred and of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(shape, generator=generator) * torch.logspace(-1, 2, shape[1]) + 30.0
    labels = torch.arange(shape[0]) % 3 == 0
    probe = fit_probe(features, labels, l2)
    x, w = features.double().numpy(), probe.weight.numpy()
    gradient, bias_gradient = l2 * w, 0.0
    for row, label in zip(x, labels.tolist(), strict=True):
        residual = 1 / (1 + math.exp(-(row @ w + probe.bias))) - label
        gradient, bias_gradient = gradient + residual * row, bias_gradient + residual
    assert np.abs(gradient).max() < 1e-7 and abs(bias_gradient) < 1e-9


def test_the_known_direction_is_found():
    generator = torch.Generator().manual_seed(1)
    direction = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
    features = torch.randn(4000, 16, generator=generator)
    labels = torch.rand(4000, generator=generator) < torch.sigmoid(4 * features @ direction)
    weight = fit_probe(features, labels).weight
    assert weight @ direction.double() / weight.norm() > 0.99


@pytest.mark.parametrize(
    "features, labels, l2, message",
    [
        (torch.ones(2, 1), torch.tensor([True, True]), 1.0, "all 2 labels are True"),
        (torch.ones(2, 1), torch.tensor([False, False]), 1.0, "all 2 labels are False"),
        (torch.ones(2, 1), torch.tensor([1, 0]), 1.0, "labels must be bool"),
        (torch.ones(2, 1), TRUE_FALSE, 0.0, "l2 must be positive"),
        (torch.tensor([[1.0], [math.inf]]), TRUE_FALSE, 1.0, "not finite"),
    ],
)
def test_what_cannot_be_fitted_is_refused(features, labels, l2, message):
    with pytest.raises(ValueError, match=message):
        fit_probe(features, labels, l2)


def test_quality_by_hand():
    """Logits 2, -1 | 1, -2, -3 of true | false texts: 3 of 5 right; of 6 pairs, 2 beats all, -1 beats 2: 5/6."""
    features = torch.tensor([[2.0], [-1.0], [1.0], [-2.0], [-3.0]])
    labels = torch.tensor([True, True, False, False, False])
    quality = probe_quality(Probe(torch.ones(1, dtype=torch.float64)), features, labels)
    assert quality == pytest.approx(
        {"num_texts": 5, "accuracy": 3 / 5, "commoner_label": 3 / 5, "auc": 5 / 6}
    )


# --- features -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_means_are_over_the_text_alone(model_type, batch_size):
    """Row by row without padding, from what transformers calls hidden_states[-1], averaged by numpy."""
    model = tiny_model(model_type)
    contexts, texts = [[5, 6, 7], [], [8], []], [[20, 21], [22, 23, 24, 25], [26], [27, 28]]
    found = mean_hidden_states(model, contexts, texts, batch_size)
    for row, (context, text) in enumerate(zip(contexts, texts, strict=True)):
        with torch.no_grad():
            output = model(input_ids=torch.tensor([context + text]), output_hidden_states=True)
        hidden = output.hidden_states[-1][0].double().numpy()
        np.testing.assert_allclose(found[row], hidden[len(context) :].mean(axis=0), rtol=0, atol=3e-6)


def test_an_empty_text_is_refused():
    with pytest.raises(ValueError, match="text 1 is empty"):
        mean_hidden_states(tiny_model("gpt_neox"), [[5], [6]], [[7], []], 2)


# --- files ----------------------------------------------------------------------------------------------


def test_a_probe_survives_its_file(tmp_path):
    save_probe(Probe(torch.tensor([1.5, -2.0], dtype=torch.float64), bias=0.25), tmp_path / "probe.npz")
    loaded = load_probe(tmp_path / "probe.npz")
    assert (loaded.weight.tolist(), loaded.bias) == ([1.5, -2.0], 0.25)


def test_vectors_of_other_tools_are_read(tmp_path):
    np.save(tmp_path / "coef.npy", np.array([[1.0, 2.0]], dtype=np.float32))
    torch.save(torch.tensor([3.0, 4.0], dtype=torch.bfloat16), tmp_path / "probe.pt")
    for name, weight in (("coef.npy", [1.0, 2.0]), ("probe.pt", [3.0, 4.0])):
        loaded = load_probe(tmp_path / name)
        assert loaded.weight.tolist() == weight and loaded.weight.dtype == torch.float64
        assert loaded.bias == 0.0


def test_other_files_are_refused(tmp_path):
    np.save(tmp_path / "matrix.npy", np.ones((2, 3)))
    np.save(tmp_path / "nan.npy", np.array([1.0, np.nan]))
    np.savez(tmp_path / "names.npz", vector=np.ones(3))
    torch.save({"weight": torch.ones(3)}, tmp_path / "dict.pt")
    (tmp_path / "broken.npy").write_bytes(b"none")
    (tmp_path / "probe.txt").write_text("1 2 3")
    for name, message in {
        "matrix.npy": r"one vector of finite numbers, found shape \(2, 3\)",
        "nan.npy": "one vector of finite numbers",
        "names.npz": "cannot read the probe file .*weight",
        "dict.pt": "holds dict",
        "broken.npy": "cannot read the probe file",
        "probe.txt": "is .npz, .npy or .pt",
        "missing.npy": "no probe file",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_probe(tmp_path / name)
