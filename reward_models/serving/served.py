"""What a server scores with: a reward model, or an ensemble that scores as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from drpo.config import ConfigError
from drpo.data.records import DataError
from drpo.models.positions import position_limit
from drpo.trainers.reward_parts import EnsembleConfig
from reward_models.ensembles import combine, spread
from reward_models.score import RewardModelScorer
from reward_models.serving.identity import common_hash, joint_id, model_id, template_hash
from reward_models.serving.rows import BadRequest, Limits, Row, RowReader, read_request


class ServedModel:
    """Reward models behind a server; each reads every row in its own tokens."""

    def __init__(
        self,
        scorers: Mapping[str, RewardModelScorer],
        limits: Limits,
        ensemble: EnsembleConfig | None = None,
    ) -> None:
        """Describe the models. Raises ConfigError for members that no prompt suits.

        Args:
            scorers: the models by name, loaded without a policy's tokenizer.
            limits: largest requests.
            ensemble: how the scores of several models become one; None for one model.
        """
        self.limits, self._ensemble = limits, ensemble
        self._scorers = list(scorers.values())
        self._readers = [RowReader(scorer, _own_limits(scorer, limits)) for scorer in self._scorers]
        self.batch_size = self._scorers[0].batch_size
        described = zip(scorers.items(), self._readers, strict=True)
        members = [_info(name, scorer, reader) for (name, scorer), reader in described]
        self.info = members[0] if ensemble is None else _joint_info(members, ensemble)

    def read(self, body: bytes) -> list[tuple[Row, ...]]:
        """Return the rows of a JSON body in each model's tokens. Raises BadRequest, naming the row."""
        request = read_request(body, self.limits.max_rows)
        rows = []
        for number, row in enumerate(request.rows):
            try:
                rows.append(tuple(reader.row(row, request.tokenizer) for reader in self._readers))
            except BadRequest as error:
                raise BadRequest(error.status, f"rows[{number}]: {error}") from None
        return rows

    def score(self, rows: Sequence[tuple[Row, ...]]) -> Tensor:
        """Return the scores (B, 1), float32; of an ensemble (B, 2), with the members' spread."""
        columns = zip(*rows, strict=True)
        scores = torch.stack(
            [scorer.score_ids(own) for scorer, own in zip(self._scorers, columns, strict=True)]
        )
        if self._ensemble is None:
            return scores.T
        combined = combine(scores, self._ensemble.combine, self._ensemble.coef)
        return torch.stack([combined, spread(scores).float()], dim=1)


def _own_limits(scorer: RewardModelScorer, limits: Limits) -> Limits:
    lengths = [limit for limit in (limits.max_tokens, position_limit(scorer.model)) if limit is not None]
    return replace(limits, max_tokens=min(lengths, default=None))


def _info(name: str, scorer: RewardModelScorer, reader: RowReader) -> dict[str, Any]:
    """Describe a model: what a run compares before it trains on the scores."""
    config, tokenizer = scorer.model.config, scorer.tokenizer
    precision = f"{next(scorer.model.backbone.parameters()).dtype}, {scorer.engine.precision}"
    return {
        "name": name,
        "model": model_id(scorer.model, tokenizer, precision),
        "centre": config.centre,
        "scale": config.scale,
        "aggregation": config.aggregation,
        "tokenizer": reader.tokenizer_hash,
        "template": template_hash(tokenizer),
        "reads_chat": _reads_chat(scorer),
        "chat_template": getattr(config, "chat_template", None),
        "chat_template_kwargs": getattr(config, "chat_template_kwargs", {}),
        "precision": precision,
        "max_tokens": reader.limits.max_tokens,
        "max_rows": reader.limits.max_rows,
        "max_bytes": reader.limits.max_bytes,
    }


def _joint_info(members: Sequence[dict[str, Any]], ensemble: EnsembleConfig) -> dict[str, Any]:
    """Describe an ensemble: what its members share, null where they differ, and the members themselves.

    Tokenizers or renderings that differ have a hash that no client's own equals, so that clients send texts.
    """
    first = members[0]
    trained_on = {member["chat_template"] for member in members} - {None}
    if len(trained_on) > 1:
        raise ConfigError(
            "MODEL: some members were trained on conversations (data.chat_template) and some on plain texts, so no "
            "prompt suits all; serve them apart"
        )
    renderings = [
        [member[key] for key in ("template", "chat_template", "chat_template_kwargs")] for member in members
    ]
    lengths = [member["max_tokens"] for member in members if member["max_tokens"] is not None]
    names = ("name", "model", "centre", "scale", "aggregation")
    shared = ("centre", "scale", "aggregation", "precision", "max_rows", "max_bytes", "chat_template_kwargs")
    return {
        **{key: first[key] if all(m[key] == first[key] for m in members) else None for key in shared},
        "name": f"{ensemble.combine} of {', '.join(member['name'] for member in members)}",
        "model": joint_id([member["model"] for member in members], ensemble.combine, ensemble.coef),
        "tokenizer": common_hash([member["tokenizer"] for member in members]),
        "template": first["template"]
        if all(r == renderings[0] for r in renderings)
        else common_hash(renderings),
        "reads_chat": all(member["reads_chat"] for member in members),
        "chat_template": next(iter(trained_on), None),
        "max_tokens": min(lengths, default=None),
        "combine": ensemble.combine,
        "coef": ensemble.coef,
        "members": [{name: member[name] for name in names} for member in members],
    }


def _reads_chat(scorer: RewardModelScorer) -> bool:
    """Return whether the model can render conversations."""
    try:
        scorer.check_reads(chat=True)
    except (ConfigError, DataError):
        return False
    return True
