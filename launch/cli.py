"""The installed command: `drpo <command> [recipe.yaml] [section.key=value ...]`.

drpo sft | reward-model | drpo | ppo | dpo            train
drpo plan RECIPE --gpus 8xH100                        size a training run before it
drpo serve-rollouts MODEL --max-tokens N              sample for training runs by a vLLM server
drpo export-reward-model MODEL FOLDER                 write it as transformers' sequence classifier
drpo serve-reward-model MODEL                         score for training runs
drpo complete | judge | compare | report              evaluate
drpo evaluate-reward-model                            evaluate reward models
drpo label | import-labels | agreement                ask people
drpo neuron-shift                                     look inside
drpo launch [--accelerate NAME] COMMAND ...           any of them on several processes or GPUs
drpo env                                              what a bug report needs
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from drpo.config import ConfigError

LAUNCH = Path(__file__).resolve().parent
COMMANDS = (
    *("sft", "reward-model", "drpo", "ppo", "dpo", "plan"),
    *("serve-rollouts", "serve-reward-model", "export-reward-model"),
    *("complete", "judge", "compare", "report", "evaluate-reward-model"),
    *("label", "import-labels", "agreement", "neuron-shift"),
)


def main() -> None:
    """Run the command named by the first argument, with the arguments of launch/<command>.py."""
    try:
        _run(sys.argv[1:])
    except ConfigError as error:
        raise SystemExit(f"drpo: {error}") from None


def _run(arguments: list[str]) -> None:
    match arguments:
        case [] | ["-h" | "--help", *_]:
            print(__doc__.strip())
        case ["env", *_]:
            from launch.environment import environment_text  # torch is slow to import, and only this needs it

            print(environment_text())
        case ["launch", *rest]:
            _launch(rest)
        case [command, *rest]:
            sys.argv = [f"drpo {command}", *rest]
            runpy.run_module(f"launch.{_module(command)}", run_name="__main__")


def _launch(arguments: list[str]) -> None:
    """Run `accelerate launch` with one of the shipped configs, found by its name, or with the user's own."""
    config = None
    if arguments[:1] == ["--accelerate"]:
        if len(arguments) < 3:
            raise ConfigError(f"--accelerate needs a name ({', '.join(accelerate_configs())}) and a command")
        config, arguments = accelerate_config(arguments[1]), arguments[2:]
    if not arguments:
        raise ConfigError(f"launch needs a command: {', '.join(COMMANDS)}")
    script = LAUNCH / f"{_module(arguments[0])}.py"
    options = ["--config_file", str(config)] if config else []
    sys.argv = ["accelerate-launch", *options, str(script), *arguments[1:]]
    runpy.run_module("accelerate.commands.launch", run_name="__main__")


def accelerate_configs() -> list[str]:
    """Return the names of the shipped accelerate configs."""
    return sorted(path.stem for path in (LAUNCH / "accelerate").glob("*.yaml"))


def accelerate_config(name: str) -> Path:
    """Find a config by its path or its shipped name; raise ConfigError if there is none."""
    for path in (Path(name), LAUNCH / "accelerate" / f"{name}.yaml"):
        if path.is_file():
            return path
    raise ConfigError(f"no accelerate config {name}; the shipped ones are {', '.join(accelerate_configs())}")


def _module(command: str) -> str:
    if command not in COMMANDS:
        raise ConfigError(f"unknown command {command}; there are {', '.join(COMMANDS)}, launch and env")
    return command.replace("-", "_")


if __name__ == "__main__":
    main()
