"""Ask people which of two systems responds better, on a local page that shows the responses blind."""

from __future__ import annotations

import signal
import threading
from contextlib import closing
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import quote

from drpo.config import ConfigError, Section, refuse, save_resolved, setting
from drpo.data.records import DataError
from drpo.run.signals import handles_signals
from eval.completions.rows import load_completions
from eval.judging.attacks import with_controls
from eval.judging.matchup import Matchup, first_prompts, pair_up
from eval.judging.openai.pairwise import load_prompt
from eval.labelling.label_queue import LabelQueue
from eval.labelling.label_server import LabelServer, is_loopback
from eval.labelling.labels import LabelsWriter, checked_annotator
from eval.progress import Say


@dataclass(frozen=True)
class LabelRecipe(Section):
    """One system against a baseline, compared by people on the prompts that both answered."""

    run_dir: str = "runs/label"
    """Folder of the labels."""
    completions: list[str] = field(default_factory=list)
    """Files of completions: completions.jsonl, or .json in alpaca_eval's shape."""
    system: str | None = None
    """The system to compare. Besides those of the files there are reference (the dataset's responses), null (a
    constant) and attack/<name> (eval/judging/attacks.py)."""
    baseline: str = "reference"
    """The system that it is compared with."""
    num_prompts: int | None = setting(None, ge=1)
    """Number of prompts, selected by hash as in launch/judge.py; null for all."""
    prompt: str | None = None
    """The question: tldr-1, hh_helpful-1, hh_harmless-1, or a .yaml file with one's own prompt."""
    ties: bool = True
    """Whether a tie may be called."""
    annotators: list[str] = field(default_factory=list)
    """Who may label; empty: anyone who gives a name."""
    seed: int = 0
    """Draws the order of the pairs and which response is shown first, for each annotator anew."""
    host: str = "127.0.0.1"
    """Address to listen on. Any other than this machine's own lets anyone who reaches it read the texts and label."""
    port: int = setting(0, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""

    def check(self) -> None:
        for name in self.annotators:
            refuse(checked_annotator(name) != name, "annotators", f"must be plain names, got {name!r}")
        has_repeats = len({name.casefold() for name in self.annotators}) < len(self.annotators)
        refuse(
            has_repeats, "annotators", f"must differ in more than upper and lower case, got {self.annotators}"
        )
        try:
            address = ip_address("127.0.0.1" if self.host == "localhost" else self.host)
        except ValueError:
            address = None
        refuse(address is None, "host", f"must be an address such as 127.0.0.1, got {self.host!r}")
        rule = f"must be one address, by which the page is opened, got {self.host}"
        refuse(address.is_unspecified, "host", rule)


def label(recipe: LabelRecipe, say: Say = print) -> Path:
    """Pair the responses and serve the page until SIGINT or SIGTERM. Returns the path of labels.jsonl."""
    if not recipe.completions or recipe.system is None:
        raise ConfigError("completions must name files with completions, and system one of their systems")
    if recipe.prompt is None:
        raise ConfigError("prompt must say what the annotators are asked, such as prompt=tldr-1")
    prompt = load_prompt(recipe.prompt)
    matchups = matchups_to_label(recipe, say)
    path = Path(recipe.run_dir) / "labels.jsonl"
    writer = LabelsWriter(path)
    if writer.num_cut:
        say(
            f"{path}: cut off {writer.num_cut} bytes of a label that a kill left unfinished; it did not count"
        )
    queue = LabelQueue(matchups, writer, prompt, recipe.ties, recipe.annotators, recipe.seed)
    save_resolved(recipe, path.with_name("config.yaml"))
    try:
        server = LabelServer(queue, recipe.host, recipe.port)
    except OSError as error:
        raise ConfigError(f"cannot listen on {recipe.host}, port {recipe.port}: {error}") from None
    with server, closing(queue):
        say(f"{len(queue)} pairs of {recipe.system} and {recipe.baseline}, labels in {path}")
        _show_progress(queue, say)
        if not is_loopback(recipe.host):
            say(f"anyone who reaches {recipe.host} can read these texts and label them")
        for name in recipe.annotators or [None]:
            say(f"open {server.url}" + (f"?annotator={quote(name)}" if name else ""))
        say("Ctrl-C ends it")
        _serve(server)
    _show_progress(queue, say)
    return path


def matchups_to_label(recipe: LabelRecipe, say: Say = print) -> list[Matchup]:
    """Return the recipe's matchups, without those of two equal responses."""
    rows = with_controls(load_completions(recipe.completions), recipe.system, recipe.baseline)
    matchups = pair_up(rows, recipe.system, recipe.baseline)
    if recipe.num_prompts is not None:
        matchups = first_prompts(matchups, recipe.num_prompts)
    unequal = [c for c in matchups if c.response_a.strip() != c.response_b.strip()]
    if not unequal:
        systems = f"{recipe.system} and {recipe.baseline}"
        raise DataError(f"{systems} gave equal responses everywhere: nothing to label")
    if num_equal := len(matchups) - len(unequal):
        say(f"{num_equal} of {len(matchups)} pairs are left out: equal responses")
    return unequal


def _show_progress(queue: LabelQueue, say: Say) -> None:
    for name, done in queue.progress().items():
        say(f"{name}: {done} of {len(queue)} done")


def _serve(server: LabelServer) -> None:
    """Serve until SIGINT or SIGTERM, or KeyboardInterrupt outside `graceful_shutdown`.

    Labels are flushed before they are acknowledged, so shutdown need not wait.
    """

    def stop(*_: object) -> None:
        threading.Thread(target=server.shutdown).start()  # it blocks until serve_forever returns

    numbers = (signal.SIGINT, signal.SIGTERM) if handles_signals() else ()
    handlers = {number: signal.signal(number, stop) for number in numbers}
    try:
        server.serve_forever()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
