"""What a client asks a reward-model server to score, and its way into the model's tokens."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from drpo.config import ConfigError
from drpo.data.chat import require_messages
from drpo.data.records import Chat, DataError, Record, RowError
from drpo.rewards import Completion
from reward_models.score import RewardModelScorer
from reward_models.serving.identity import vocabulary_hash

Row = tuple[list[int], list[int]]
"Tokens of a prompt and of a response."
TokenId = Annotated[int, Field(ge=0)]


class BadRequest(Exception):
    """A request that cannot be answered: HTTP status and reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class ScoreRow(BaseModel):
    """A response to score, after a plain `prompt`, a conversation (`messages`), or as token ids."""

    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    response: str | None = None
    query_ids: list[TokenId] | None = None
    response_ids: list[TokenId] | None = None
    chat: bool = False
    "Of token ids: whether the prompt is a conversation, rendered by the model's own chat template."
    ended: bool = True
    "Whether the response ended; token ids then end with a stop token, whichever."


class ScoreRequest(BaseModel):
    """The body of POST /score."""

    model_config = ConfigDict(extra="forbid", strict=True)
    rows: list[ScoreRow] = Field(min_length=1)
    tokenizer: str | None = None
    "Hash of the vocabulary that token ids are of."


@dataclasses.dataclass(frozen=True)
class Limits:
    """Largest requests that a server takes."""

    max_rows: int
    "Rows of a request."
    max_bytes: int
    "Bytes of its body."
    max_tokens: int | None
    "Tokens of a row, prompt and response; None where the model has no limit and none was set."


def read_request(body: bytes, max_rows: int) -> ScoreRequest:
    """Read a JSON body. Raises BadRequest for one of another shape, or with too many rows."""
    try:
        request = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        raise BadRequest(422, _described(error)) from None
    if len(request.rows) > max_rows:
        raise BadRequest(413, f"{len(request.rows)} rows in a request, this server takes {max_rows}")
    return request


class RowReader:
    """Turns rows of requests into the model's tokens, exactly as the scorer itself reads completions."""

    def __init__(self, scorer: RewardModelScorer, limits: Limits) -> None:
        self._scorer, self.limits = scorer, limits
        self.tokenizer_hash = vocabulary_hash(scorer.tokenizer)
        self._num_tokens = scorer.model.backbone.get_input_embeddings().weight.shape[0]

    def row(self, row: ScoreRow, tokenizer: str | None) -> Row:
        """Return the tokens of prompt and response. Raises BadRequest for a row that cannot be scored.

        `tokenizer` is the hash of the vocabulary that token ids are of.
        """
        return self._checked(self._ids(row, tokenizer))

    def _ids(self, row: ScoreRow, tokenizer: str | None) -> Row:
        match (row.prompt, row.messages, row.response, row.query_ids, row.response_ids):
            case (str(), None, str(), None, None) | (None, list(), str(), None, None):
                return self._text_ids(row)
            case (None, None, None, list(), list()):
                return self._own_ids(row, tokenizer)
        raise BadRequest(
            422, "give prompt and response, messages and response, or query_ids and response_ids"
        )

    def _text_ids(self, row: ScoreRow) -> Row:
        chat = None
        if row.chat:
            raise BadRequest(422, "chat is for token ids; a conversation is given as messages")
        try:
            if row.messages is not None:
                chat = Chat(tuple(require_messages(row.messages, "messages")), "")
                if not chat.messages:
                    raise BadRequest(422, "messages is empty")
            self._check_trained_on(chat is not None)
            completion = Completion(row.prompt or "", row.response, row.ended, [], [], Record("", chat=chat))
            return self._scorer.text_ids(completion, row.ended, chat is not None)
        except (ConfigError, DataError, RowError, TypeError, ValueError) as error:
            raise BadRequest(422, str(error)) from None

    def _own_ids(self, row: ScoreRow, tokenizer: str | None) -> Row:
        if tokenizer != self.tokenizer_hash:
            raise BadRequest(
                409,
                f"token ids of another vocabulary than this model's ({self.tokenizer_hash}): send texts",
            )
        self._check_trained_on(row.chat)
        for ids in (row.query_ids, row.response_ids):
            if unknown := [i for i in ids if i >= self._num_tokens]:
                raise BadRequest(422, f"token id {unknown[0]}, and the model has {self._num_tokens} tokens")
        if not row.response_ids:
            raise BadRequest(422, "response_ids is empty, so there is nothing to score")
        try:
            return row.query_ids, self._scorer.own_stop(row.response_ids, row.ended, row.chat)
        except (ConfigError, DataError) as error:
            raise BadRequest(422, str(error)) from None

    def _check_trained_on(self, reads_chat: bool) -> None:
        trained = getattr(self._scorer.model.config, "chat_template", None)
        if trained not in (None, reads_chat):
            wanted = "conversations (messages)" if trained else "plain texts (prompt)"
            raise BadRequest(422, f"this reward model was trained on {wanted}, send those")

    def _checked(self, row: Row) -> Row:
        num_tokens, limit = len(row[0]) + len(row[1]), self.limits.max_tokens
        for ids, what in zip(row, ("prompt", "response"), strict=True):
            if not ids:
                raise BadRequest(422, f"the {what} has no token")
        if limit is not None and num_tokens > limit:
            raise BadRequest(422, f"{num_tokens} tokens, prompt and response; this server takes {limit}")
        return row


def _described(error: ValidationError) -> str:
    """Describe the first fault of a body, without repeating what was sent."""
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    parts = [
        part if isinstance(part, int) else str(part)[:60] for part in fault["loc"]
    ]  # a key may be anything
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{place.lstrip('.') or 'the body'}: {fault['msg']}{more}"
