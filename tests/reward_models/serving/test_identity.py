"""What changes the id of a served model, and what does not."""

from __future__ import annotations

from reward_model_folders import save_reward_model
from tiny_tokenizers import single_bytes

from reward_models.serving.identity import model_id


def test_an_id_depends_on_zero_and_unit_but_not_on_where_they_came_from(tmp_path):
    tokenizer = single_bytes()
    model = save_reward_model(tmp_path, tokenizer)
    first = model_id(model, tokenizer, "float32")
    model.config.score_normalised = ["centre"]
    assert model_id(model, tokenizer, "float32") == first
    model.config.centre = 0.25
    assert model_id(model, tokenizer, "float32") != first
