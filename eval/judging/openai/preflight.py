"""Checks before the first question: the model exists, its shutdown date, the form of its answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import date, datetime, timezone

import openai
from openai import AsyncOpenAI

from eval.completions.rows import prompt_id_of
from eval.judging.judge import JudgeStopped
from eval.judging.matchup import Matchup, Question
from eval.judging.openai.answer import Form, shorten
from eval.judging.openai.answer_body import decoded, objects_in
from eval.judging.openai.openai_judge import OpenAIJudge
from eval.judging.openai.request import JudgeSetup
from eval.judging.openai.retry import classify
from eval.judging.openai.settings import OpenAISettings
from eval.judging.openai.store import Store, call_key
from eval.progress import Say

WARN_DAYS = 60
"Warn of a shutdown within this many days."
NUM_SHOWN = 12

_POST = (
    "My flatmate moved out yesterday and left a cat behind. I like the cat, but my lease forbids pets and the landlord "
    "comes on Friday. Nobody in my family can take it. How do I find it a good home by then?"
)
PROBE = Question(
    Matchup(
        prompt_id_of(_POST),
        _POST,
        "probe",
        "Flatmate left a cat, the lease forbids pets and the landlord comes on Friday; how to rehome it in time?",
        "null",
        "I had noodles for lunch.",
    ),
    "ab",
)
"A question that everybody answers alike."


async def check_model(
    client: AsyncOpenAI, config: OpenAISettings, say: Say, today: date | None = None
) -> None:
    """Check that the model exists and is not shut down, and warn of an upcoming shutdown.

    Raises JudgeStopped when OpenAI does not have the model, it is shut down, the key is not accepted, its credit is
    exhausted or the server is unreachable. Transient errors, other servers without this information and keys without
    permission to look up models are only reported.
    """
    try:
        model = await client.models.retrieve(config.model)
    except openai.NotFoundError:
        await _check_listed(client, config, say)
        return
    except Exception as error:
        failure = classify(error)
        stops = failure.action == "stop" and failure.cause != "key"
        if stops or isinstance(error, openai.APIConnectionError):
            raise JudgeStopped(f"{config.url}: {failure.detail}") from None
        say(f"could not look up {config.model}: {failure.detail}")
        return
    shutdown = _date(getattr(model, "shutdown_date", None))
    if shutdown is None:
        return
    days = (shutdown - (today or datetime.now(timezone.utc).date())).days
    if days < 0:
        raise JudgeStopped(f"{config.model} was shut down on {shutdown}; name another judge.model")
    if days <= WARN_DAYS:
        say(
            f"{config.model} is shut down on {shutdown}, in {days} days: its verdicts cannot be repeated after that"
        )


async def _check_listed(client: AsyncOpenAI, config: OpenAISettings, say: Say) -> None:
    """Check that the list of models contains the model, after a look-up by name found none.

    Servers other than OpenAI's may load unlisted models, so there the first call decides.
    """
    try:
        # Raw: the parsed call raises AttributeError on an HTML page.
        raw = await client.models.with_raw_response.list()
        names = [str(model.get("id")) for model in objects_in(decoded(raw.text))]
    except Exception as error:
        failure = classify(error)
        if failure.action == "stop" and failure.cause in ("money", "day", "place"):
            raise JudgeStopped(f"{config.url}: {failure.detail}") from None
        if config.base_url is None:
            raise JudgeStopped(f"no model {config.model}: {failure.detail}") from None
        say(f"{config.base_url} does not tell which models it has: {failure.detail}")
        return
    if config.model not in names:
        listed = ", ".join(sorted(names)[:NUM_SHOWN]) + (", ..." if len(names) > NUM_SHOWN else "")
        message = f"{config.url} does not list the model {config.model}; it has: {listed or 'none'}"
        if config.base_url is None:
            raise JudgeStopped(message)
        say(message)


def _date(text: object) -> date | None:
    try:
        return datetime.fromisoformat(str(text).replace("Z", "+00:00")).date()
    except ValueError:
        return None


def known_form(setup: JudgeSetup, store: Store) -> Form | None:
    """Return the form in which this model with these settings answered an earlier probe, None before one."""
    return store.fact(_fact_name(setup))


def _fact_name(setup: JudgeSetup) -> str:
    request = replace(setup, form="json").request(PROBE, 0)
    return f"form:{call_key({'probe': request.key, 'asked': setup.config.form})}"


async def probe_form(
    make_judge: Callable[[JudgeSetup], OpenAIJudge], setup: JudgeSetup, store: Store, say: Say
) -> Form:
    """Ask one easy question and return the form of the model's answer: a schema if it keeps to one, else text.

    The result is stored, so a rerun uses the same form and pays for no second probe.
    Raises JudgeStopped when the model refuses a setting, gives no answer, or needs more tokens than allowed.
    """
    stored_form = known_form(setup, store)
    if stored_form is not None:
        return stored_form
    forms: tuple[Form, ...] = ("json", "text") if setup.config.form == "auto" else (setup.config.form,)
    for form in forms:
        is_last = form == forms[-1]
        setup = replace(setup, form=form)
        try:
            call = await make_judge(setup).call(setup.request(PROBE, 0))
        except JudgeStopped as error:
            if error.param == "response_format" and not is_last:
                continue
            if error.param == "temperature":
                raise JudgeStopped(f"{error}; give judge.temperature=null") from None
            raise
        parsed = setup.read(call)
        match parsed.status:
            case "ok":
                break
            case "truncated":
                raise JudgeStopped(
                    f"the answer to a probe was cut at judge.max_output_tokens={setup.config.max_output_tokens}; "
                    "reasoning models need more, for their thoughts count"
                )
            case "failed" if is_last:
                raise JudgeStopped(f"the probe got no answer: {parsed.detail}")
        if is_last:
            text = shorten(call.text or "", 100)
            detail = f"{parsed.detail}; it says {text!r}" if text else parsed.detail
            say(f"the answer to a probe cannot be read ({parsed.status}: {detail})")
    store.put_fact(_fact_name(setup), form)
    return form
