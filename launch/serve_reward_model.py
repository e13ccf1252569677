"""Serve a reward model's scores to training runs (reward.url) and other programs, over HTTP.

python launch/serve_reward_model.py MODEL [MODEL ...] [--combine min] [--host H] [--port P] [--batch-size N] ...
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import get_args

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

from drpo.config import ConfigError
from drpo.engine import Engine, EngineConfig
from drpo.models.model_folder import is_local
from drpo.trainers.reward_parts import Combination, EnsembleConfig
from launch.command_line import quieten_libraries
from reward_models.score import RewardModelScorer
from reward_models.serving.client import TOKEN_VARIABLE
from reward_models.units import check_units

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def main() -> None:
    """Read the command line, load the model, and serve it until SIGINT or SIGTERM."""
    options = parser().parse_intermixed_args()
    quieten_libraries()
    script = Path(sys.argv[0]).name
    try:
        serve(options)
    except (ConfigError, OSError) as error:
        raise SystemExit(f"{script}: {error}") from None


def serve(options: argparse.Namespace) -> None:
    """Load the model and serve it. Raises ConfigError for a model that cannot be served."""
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"serving needs {' and '.join(missing)}: pip install -e '.[serve]'")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("this runs in one process: start it with python")
    import uvicorn

    from reward_models.serving.app import RewardServer
    from reward_models.serving.rows import Limits
    from reward_models.serving.served import ServedModel

    token = os.environ.get(TOKEN_VARIABLE) or None
    if token is None and options.host not in LOOPBACK:
        print(f"warning: whoever reaches {options.host} can ask for scores; set {TOKEN_VARIABLE}", flush=True)
    engine = Engine(
        EngineConfig(mixed_precision=options.mixed_precision, trackers=[]),
        Path("."),
        seed=0,
        max_grad_norm=None,
    )
    limits = Limits(options.max_rows, options.max_megabytes * 2**20, options.max_tokens)
    server = RewardServer(
        ServedModel(load(options, engine), limits, ensemble_of(options)),
        token,
        max_wait=options.max_wait_ms / 1000,
        max_waiting=options.max_waiting,
        max_requests=options.max_requests,
    )
    print(f"model {server.info['name']}, id {server.info['model']}", flush=True)
    uvicorn.run(
        server.app,
        host=options.host,
        port=options.port,
        access_log=False,
        timeout_keep_alive=75,  # clients keep their connections between the steps of a run
    )


def ensemble_of(options: argparse.Namespace) -> EnsembleConfig | None:
    """Return how the scores of several models become one; None for one model. Raises ConfigError for bad options."""
    given = {name: value for name in ("combine", "coef") if (value := getattr(options, name)) is not None}
    if len(options.models) > 1:
        return EnsembleConfig(paths=options.models, **given)
    if given:
        raise ConfigError(f"--{next(iter(given))} is for several models: name them, or drop it")
    return None


def load(options: argparse.Namespace, engine: Engine) -> dict[str, RewardModelScorer]:
    """Load the models by name. Raises ConfigError for models whose scores cannot be combined."""
    ensemble = ensemble_of(options)  # before minutes of loading
    scorers = [
        RewardModelScorer.load(path, engine, options.batch_size, options.dtype, None, key="MODEL")
        for path in options.models
    ]
    if ensemble is not None:
        check_units([scorer.model.config for scorer in scorers], options.models, ensemble.combine, "MODEL")
    names = [Path(path).resolve().name if is_local(path) else path for path in options.models]
    if len(set(names)) < len(names):
        names = options.models  # such as seed_0/reward_model, seed_1/reward_model
    return dict(zip(names, scorers, strict=True))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(
        prog="drpo serve-reward-model",
        description="Serve a reward model's scores to training runs (reward.url) and other programs, over HTTP.",
        epilog=f"With the environment variable {TOKEN_VARIABLE}, here and in the run, only those who have the token "
        "get scores. It is sent in the clear: keep the port within a network that you trust, or behind TLS.",
        allow_abbrev=False,
    )
    found.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="folder or hub id of a reward model, or of a classifier with one label; several score as an ensemble",
    )
    found.add_argument(
        "--combine",
        choices=get_args(Combination),
        default=None,
        help="how the scores of several models become one, as reward.ensemble.combine (default: mean)",
    )
    found.add_argument(
        "--coef",
        type=float,
        default=None,
        help="weight of the members' disagreement, as reward.ensemble.coef",
    )
    found.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: this machine alone)"
    )
    found.add_argument("--port", type=_positive, default=8100)
    found.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="precision of the weights"
    )
    found.add_argument(
        "--mixed-precision",
        choices=("no", "bf16"),
        default=None,
        help="precision of the forwards, as engine.mixed_precision (default: bf16 where the device has it)",
    )
    found.add_argument("--batch-size", type=_positive, default=32, help="rows per forward")
    found.add_argument(
        "--max-wait-ms", type=_number, default=5.0, help="how long a batch waits for further requests"
    )
    found.add_argument("--max-rows", type=_positive, default=1024, help="rows of a request")
    found.add_argument("--max-megabytes", type=_positive, default=16, help="size of a request")
    found.add_argument(
        "--max-tokens",
        type=_positive,
        default=None,
        help="tokens of a row, prompt and response (default: the model's positions)",
    )
    found.add_argument("--max-waiting", type=_positive, default=8192, help="rows that may wait to be scored")
    found.add_argument(
        "--max-requests",
        type=_positive,
        default=256,
        help="requests that may be open; their bodies take at most this times --max-megabytes of memory",
    )
    return found


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1000:
        raise argparse.ArgumentTypeError(f"expected milliseconds from 0 to 1000, got {text!r}")
    return number


if __name__ == "__main__":
    main()
