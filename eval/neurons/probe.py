"""A linear probe: logistic regression on the mean of a policy's last hidden states over a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from drpo.config import ConfigError
from drpo.models.inputs import model_inputs, unwrap_peft
from eval.neurons.mlp_neurons import length_batches

TOLERANCE = 1e-12
MAX_STEPS = 100


@dataclass(frozen=True, eq=False)
class Probe:
    """P(label is true | x) = sigmoid(x . weight + bias), weight (d,) float64. `weight` is the probe direction."""

    weight: Tensor
    bias: float = 0.0

    def logits(self, features: Tensor) -> Tensor:
        """Compute x . weight + bias, (n,) float64, of features (n, d)."""
        return features.double() @ self.weight + self.bias


@torch.no_grad()
def mean_hidden_states(
    model: nn.Module,
    context_ids: Sequence[Sequence[int]],
    text_ids: Sequence[Sequence[int]],
    batch_size: int,
) -> Tensor:
    """Average the last hidden states at the tokens of each text, given its context, (n, d) float64.

        x_b = (1 / |text_b|) sum_{t in text_b} h_t

    h is the backbone's output, after its final norm. Context (which may be empty) and padding do not count. The
    model should be in evaluation mode. Raises ValueError on unequal numbers of rows, or an empty text.
    """
    for row, ids in enumerate(text_ids):
        if len(ids) == 0:
            raise ValueError(f"text {row} is empty; a mean needs a token")
    backbone = unwrap_peft(model).base_model
    device = backbone.get_input_embeddings().weight.device
    rows_of_means, means = [], []
    for rows in length_batches(context_ids, text_ids, batch_size):
        ids = [torch.tensor([*context_ids[row], *text_ids[row]]) for row in rows]
        first = torch.tensor([len(context_ids[row]) for row in rows]).unsqueeze(1)
        end = torch.tensor([len(sequence) for sequence in ids]).unsqueeze(1)
        padded = pad_sequence(ids, batch_first=True)
        columns = torch.arange(padded.shape[1])
        inputs = model_inputs(backbone, padded.to(device), (columns < end).to(device))
        hidden = backbone(**inputs, use_cache=False).last_hidden_state
        text_mask = ((columns >= first) & (columns < end)).to(device)
        sums = torch.where(text_mask.unsqueeze(-1), hidden, 0).sum(dim=1, dtype=torch.float64)
        rows_of_means += rows
        means.append((sums / text_mask.sum(dim=1, keepdim=True)).cpu())
    return torch.cat(means)[torch.tensor(rows_of_means).argsort()]


def fit_probe(features: Tensor, labels: Tensor, l2: float = 1.0) -> Probe:
    """Fit an L2-regularised logistic regression of bool labels (n,) on features (n, d).

        minimise  sum_i log(1 + exp(-y_i (x_i . w + b))) + (l2 / 2) |w|^2,   y_i = +1 for True, -1 for False

    The bias is not penalised. Newton's method with step halving, to float64 precision. Raises ValueError when
    the labels are all the same, l2 is not positive, or features are not finite.
    """
    if labels.dtype != torch.bool or labels.shape != features.shape[:1]:
        raise ValueError(f"labels must be bool (n,) for features {tuple(features.shape)}, got {labels.dtype}")
    if labels.all() or not labels.any():
        label = bool(labels.all())
        raise ValueError(f"all {len(labels)} labels are {label}; a probe needs both kinds of text")
    if not l2 > 0:
        raise ValueError(f"l2 must be positive, or separable texts have no optimum, got {l2}")
    if not features.isfinite().all():
        raise ValueError("the features are not finite: the model's hidden states have diverged")
    # The Hessian of centred features is better conditioned; the optimum is the same, since the bias is not penalised.
    mean = features.double().mean(dim=0)
    inputs = torch.cat([features.double() - mean, torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
    signs = torch.where(labels, 1.0, -1.0).double()
    penalty = torch.full((inputs.shape[1],), float(l2), dtype=torch.float64)
    penalty[-1] = 0.0

    def loss(theta: Tensor) -> Tensor:
        return nn.functional.softplus(-signs * (inputs @ theta)).sum() + 0.5 * (penalty * theta**2).sum()

    theta = torch.zeros_like(penalty)
    for _ in range(MAX_STEPS):
        probs = torch.sigmoid(inputs @ theta)
        gradient = inputs.T @ (probs - labels.double()) + penalty * theta
        hessian = inputs.T @ ((probs * (1 - probs)).unsqueeze(1) * inputs) + torch.diag(penalty)
        step = torch.linalg.solve(hessian, gradient)
        scale, max_loss = 1.0, loss(theta) * (1 + 1e-12)  # rounding must not stop the last step
        while loss(theta - scale * step) > max_loss and scale > 1e-10:
            scale /= 2
        theta = theta - scale * step
        decrement = gradient @ step  # about twice the excess loss before this step
        if decrement <= TOLERANCE * len(labels):
            break
    else:
        raise FloatingPointError(f"the probe's fit did not converge in {MAX_STEPS} steps; raise l2={l2:g}")
    weight = theta[:-1]
    return Probe(weight, float(theta[-1] - mean @ weight))


def probe_quality(probe: Probe, features: Tensor, labels: Tensor) -> dict[str, float]:
    """Measure how well a probe separates texts that it was not fitted on.

    accuracy at probability 1/2; commoner_label, the accuracy of always predicting the more common label; auc, the
    probability that a random true text gets a higher logit than a random false one (nan without one of the labels).
    """
    logits = probe.logits(features)
    true, false = logits[labels].numpy(), logits[labels.logical_not()].numpy()
    num_pairs = len(true) * len(false)
    auc = stats.mannwhitneyu(true, false).statistic / num_pairs if num_pairs else float("nan")
    return {
        "num_texts": len(labels),
        "accuracy": float(((logits > 0) == labels).double().mean()),
        "commoner_label": max(len(true), len(false)) / len(labels),
        "auc": float(auc),
    }


def save_probe(probe: Probe, path: Path) -> None:
    """Write an .npz with `weight` and `bias`, which `load_probe` reads."""
    np.savez(path, weight=probe.weight.numpy(), bias=probe.bias)


def load_probe(path: str | Path) -> Probe:
    """Load a probe from a file: .npz with `weight` (d,) and optionally `bias`, .npy or .pt with the vector alone.

    A leading axis of length 1, as scikit-learn's `coef_` has it, is dropped. Raises ConfigError for anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no probe file {path}")
    if path.suffix not in (".npz", ".npy", ".pt"):
        raise ConfigError(f"a probe file is .npz, .npy or .pt, not {path.suffix!r}: {path}")
    bias = 0.0
    try:
        if path.suffix == ".pt":
            weight = torch.load(path, map_location="cpu", weights_only=True)
        elif path.suffix == ".npy":
            weight = torch.from_numpy(np.load(path))
        else:
            with np.load(path) as arrays:
                weight, bias = torch.from_numpy(arrays["weight"]), float(arrays.get("bias", 0.0))
    except Exception as error:  # damaged files raise errors of many classes
        raise ConfigError(f"cannot read the probe file {path}: {error}") from error
    if not isinstance(weight, Tensor):
        raise ConfigError(f"{path} holds {type(weight).__name__}, not one vector")
    if weight.dim() == 2 and len(weight) == 1:
        weight = weight[0]
    if weight.dim() != 1 or not weight.isfinite().all():
        raise ConfigError(f"{path} must hold one vector of finite numbers, found shape {tuple(weight.shape)}")
    return Probe(weight.detach().double(), bias)
