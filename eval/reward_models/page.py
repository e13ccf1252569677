"""What the pages of an evaluation hold, and the Markdown one: functions of its JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eval.reporting.report_markdown import escaped, markdown_list, markdown_table
from eval.reporting.report_tables import NOTHING, Column, Table, number_text, row_of

Values = Mapping[str, Any]
MEANINGS = {
    "accuracy": "share of pairs on which the chosen response scores higher, a tie counted as one half; the pairs of a "
    "prompt are averaged first. Ties wrong: the share of pairs, each counted once, with a tie counted as wrong.",
    "ECE": "expected calibration error: mean distance between sigmoid(|margin|) and the share of right pairs, over "
    "bins of equally many pairs. By chance: 95% of perfectly calibrated models with these confidences are below it.",
    "temperature": "what the margins must be divided by for the least log loss; above 1 the model is overconfident. "
    "Fitted on the same pairs.",
    "length": "the slope is score per token at a given preference; the partial correlations hold fixed which response "
    "is preferred, the second also the gap of the data's own scores. The length judge prefers the longer response.",
    "batches": "responses scored one at a time against scores in batches: differences beyond rounding mean that the "
    "model reads its padding.",
}


def markdown_page(evaluation: Values, plots: Mapping[str, str]) -> str:
    """Write the page; `plots` are file names by title."""
    parts = [f"# {escaped(title(evaluation))}", markdown_list(facts(evaluation))]
    parts += [f"## {escaped(table.title)}\n\n{markdown_table(table)}" for table in tables(evaluation)]
    parts += [f"## {escaped(name)}\n\n![{escaped(name)}]({file})" for name, file in plots.items()]
    meanings = markdown_list(list(MEANINGS.items()))
    return "\n\n".join([*parts, f"## What the numbers are\n\n{meanings}"]) + "\n"


def title(evaluation: Values) -> str:
    """Return the title of the pages."""
    return f"Reward models on {evaluation['data']['path'] or evaluation['data']['task']}"


def facts(evaluation: Values) -> list[tuple[str, str]]:
    """Return name and text of the facts at the top: pairs, precision, intervals, models."""
    data, precision = evaluation["data"], evaluation["precision"]
    found = {
        "pairs": f"{data['num_pairs']}, of {data['num_prompts']} prompts, split {data['split']}, sha256 "
        f"{data['pairs_sha256']}",
        "precision": f"{precision['dtype']}, autocast {precision['mixed_precision']}, {precision['device']}",
        "intervals": f"{100 * evaluation['confidence']:g}%, over prompts",
    }
    for model in evaluation["models"]:
        found[model["name"]] = f"{model['kind']}, {model['path']}, sha256 {model['weights_sha256']}"
        if model["kind"] == "implicit rewards":
            reference = f"{model['reference']}, sha256 {model['reference_sha256']}"
            found[model["name"]] += f"; beta {model['beta']:g}, reference {reference}"
    return list(found.items())


def tables(evaluation: Values) -> Iterator[Table]:
    """Yield the tables, in the order of the pages."""
    models = evaluation["models"]
    yield _accuracy(evaluation, models)
    for column in models[0]["subsets"]:
        yield _groups(f"Accuracy by {column}", column, [model["subsets"][column] for model in models], models)
    if models[0]["score_gaps"] is not None:
        gaps = [model["score_gaps"] for model in models]
        yield _groups("Accuracy by the gap of the data's scores", "chosen - rejected", gaps, models)
    yield _calibration(models)
    yield _length(models)
    by_length = [model["length"]["by_length"] for model in models]
    yield _groups("Accuracy by length", "response", by_length, models)
    yield _scores(models)
    yield _checks(models)
    if evaluation["agreement"]:
        yield _agreement(evaluation["agreement"])
    if evaluation["ensembles"]:
        yield _ensembles(evaluation["ensembles"])
    if models[0]["best_of_k"] is not None:
        yield from _best_of_k(models)
    if models[0]["best_of_n"] is not None:
        yield from _best_of_n(models)


# --- cells ------------------------------------------------------------------------------------------------


def _number(value: float | None, digits: int = 3) -> str:
    return number_text(value, digits)


def _interval(value: Values | None, digits: int = 3) -> str:
    if value is None:
        return NOTHING
    low, high = (_number(value[name], digits) for name in ("low", "high"))
    middle = _number(value["value"], digits)
    return middle if NOTHING in (low, high) else f"{middle} [{low}, {high}]"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *notes: str) -> Table:
    """Make a table whose first column is text."""
    heads = [Column(name, numeric=index > 0) for index, name in enumerate(columns)]
    return Table(title, tuple(heads), tuple(row_of(*row) for row in rows), notes)


# --- tables -----------------------------------------------------------------------------------------------


def _accuracy(evaluation: Values, models: Sequence[Values]) -> Table:
    columns = (
        "model",
        "accuracy",
        "pairs",
        "right",
        "ties",
        "wrong",
        "ties half, by pair",
        "ties wrong, by pair",
    )
    rows = []
    for model in models:
        found = model["accuracy"]
        counts = [str(found[name]) for name in ("n", "right", "ties", "wrong")]
        shares = [_number(found[name]) for name in ("of_pairs", "strict_of_pairs")]
        rows.append([model["name"], _interval(found["accuracy"]), *counts, *shares])
    over = evaluation["accuracy_over_models"]
    notes = []
    if over is not None:
        notes.append(
            f"Mean of the models, with an interval for new ones and new prompts if they differ in their seed alone: "
            f"{_interval(over)}."
        )
    return _table("Accuracy", columns, rows, *notes)


def _groups(title: str, column: str, found: Sequence[Values], models: Sequence[Values]) -> Table:
    names = dict.fromkeys(name for groups in found for name in groups)
    rows = []
    for name in names:
        parts = [groups.get(name) for groups in found]
        # Lengths are counted in each model's own tokens, so the pairs of a group may differ.
        cells = [
            NOTHING if part is None else f"{_interval(part['accuracy'])} ({part['n']})" for part in parts
        ]
        rows.append([name, *cells])
    return _table(
        title, [column, *(model["name"] for model in models)], rows, "In brackets: the number of pairs."
    )


def _calibration(models: Sequence[Values]) -> Table:
    columns = (
        "model",
        "ECE",
        "by chance",
        "Brier score",
        "log loss",
        "temperature",
        "ECE at it",
        "log loss at it",
    )
    rows, notes = [], []
    for model in models:
        found = model["calibration"]
        if found["no_temperature"]:
            notes.append(f"{model['name']} has no temperature: {found['no_temperature']}.")
        rows.append(
            [
                model["name"],
                _number(found["ece"]),
                _number(found["chance_ece_high"]),
                _interval(found["brier"]),
                _interval(found["log_loss"]),
                *(_number(found[name]) for name in ("temperature", "scaled_ece", "scaled_log_loss")),
            ]
        )
    notes.append("Even odds have Brier score 0.250 and log loss 0.693.")
    return _table("Calibration", columns, rows, *notes)


def _length(models: Sequence[Values]) -> Table:
    columns = ("model", "score per token", "correlation", "partial", "partial, given the gap", "length judge")
    rows = []
    for model in models:
        found = model["length"]
        correlations = [_number(found[name]) for name in ("correlation", "partial_correlation", "given_gap")]
        judge = _interval(found["length_judge"]["accuracy"])
        rows.append([model["name"], _interval(found["slope"], 4), *correlations, judge])
    means = {_number(model["length"]["mean_difference"], 1) for model in models}
    return _table(
        "Length bias", columns, rows, f"Chosen minus rejected, on average: {', '.join(sorted(means))} tokens."
    )


def _scores(models: Sequence[Values]) -> Table:
    quantiles = ("0.05", "0.25", "0.5", "0.75", "0.95")
    columns = ("model", "mean", "deviation", *(f"{100 * float(q):g}%" for q in quantiles))
    rows = []
    for model in models:
        for name, found in model["scores"].items():
            values = [found["mean"], found["deviation"], *(found["quantiles"][q] for q in quantiles)]
            rows.append([f"{model['name']}: {name}", *map(_number, values)])
    return _table("Distribution of scores", columns, rows)


def _checks(models: Sequence[Values]) -> Table:
    columns = (
        "model",
        "references",
        "their mean score",
        "their deviation",
        "largest change alone",
        "changed outcomes",
    )
    rows = []
    for model in models:
        references, alone = model["references"], model["invariance"]
        cells = [NOTHING] * 5
        if references is not None:
            found = references["distribution"]
            cells[:3] = [str(found["n"]), _interval(references["mean"]), _number(found["deviation"])]
        if alone is not None:
            cells[3] = f"{alone['max_difference']:.1e}"
            cells[4] = f"{alone['changed_outcomes']} of {alone['num_pairs']}"
        rows.append([model["name"], *cells])
    return _table("Normalisation and batches", columns, rows)


def _agreement(agreement: Sequence[Values]) -> Table:
    rows = []
    for found in agreement:
        signs = found["signs"]
        share = {"value": signs["agreement"], "low": signs["low"], "high": signs["high"]}
        kappa = {"value": signs["kappa"], "low": signs["kappa_low"], "high": signs["kappa_high"]}
        rows.append(
            [" and ".join(found["models"]), _interval(share), _interval(kappa), _number(found["spearman"])]
        )
    columns = ("models", "same outcome", "kappa", "Spearman of the margins")
    note = "Kappa is 0 for models with independent errors at their accuracies, 1 for equal outcomes."
    return _table("Agreement of the models", columns, rows, note)


def _ensembles(ensembles: Sequence[Values]) -> Table:
    columns = ("ensemble", "accuracy", "gain over its members", "ECE", "log loss", "temperature", "partial")
    rows = []
    for found in ensembles:
        calibration, length = found["calibration"], found["length"]
        cells = [
            _interval(found["accuracy"]["accuracy"]),
            _interval(found["gain"]),
            _number(calibration["ece"]),
            _interval(calibration["log_loss"]),
            _number(calibration["temperature"]),
            _number(length["partial_correlation"]),
        ]
        rows.append([found["name"], *cells])
    note = "Gain: accuracy less the mean accuracy of the members, paired by prompt; for new prompts, these members."
    return _table("Ensembles", columns, rows, note)


def _best_of_k(models: Sequence[Values]) -> Iterator[Table]:
    names = list(models[0]["best_of_k"]["subsets"])
    rows = []
    for model in models:
        found = model["best_of_k"]
        cells = [_interval(found["subsets"][name]["accuracy"]) for name in names]
        rows.append([model["name"], *cells, _number(found["mean_of_subsets"])])
    if names:
        note = "Right responses among those of the highest score: 1/k where one right response ties with k - 1 others."
        yield _table("Best of k", ["model", *names, "mean of the subsets"], rows, note)
    if models[0]["best_of_k"]["ties"] is not None:
        rows = []
        for model in models:
            ties = model["best_of_k"]["ties"]
            shares = [_number(ties[name]) for name in ("all_right_first", "gap_exceeds_spread")]
            score = ties["rewardbench_2"]
            rows.append([model["name"], str(ties["n"]), *shares, _number(score and score["overall"])])
        columns = (
            "model",
            "prompts",
            "all right ones first",
            "gap above the spread of the right ones",
            "score",
        )
        note = "Score: RewardBench 2's of Ties, where the rows have its ids (ref:<n> and tied:<n>)."
        yield _table("Ties", columns, rows, note)


def _best_of_n(models: Sequence[Values]) -> Iterator[Table]:
    result = models[0]["best_of_n"]
    shown = [n for n in result["n"] if n & (n - 1) == 0 or n == result["n"][-1]]
    titles = {
        "score": "score of its pick",
        "true_reward": "true reward of its pick",
        "true_best": "best possible",
    }
    names = [name for name in titles if name in result["curves"]]
    for model in models:
        found = model["best_of_n"]
        rows = [
            [
                str(n),
                _number(found["kl_bound"][n - 1]),
                *(_interval(found["curves"][name][n - 1]) for name in names),
            ]
            for n in shown
        ]
        columns = ("n", "KL bound (nats)", *(titles[name] for name in names))
        note = f"{found['num_prompts']} prompts, {result['n'][-1]} samples each."
        yield _table(f"Best of n: {model['name']}", columns, rows, note)
