"""The Dockerfile: it copies what there is, with the versions that are pinned. No image is built."""

from __future__ import annotations

import configparser
import re

import pytest
from tiny_runs import ROOT

DOCKERFILE = (ROOT / "launch" / "docker" / "Dockerfile").read_text()
INSTRUCTIONS = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE)).splitlines()


def instructions(name: str) -> list[str]:
    return [line.removeprefix(f"{name} ") for line in INSTRUCTIONS if line.startswith(f"{name} ")]


def copied() -> list[str]:
    return [source for line in instructions("COPY") for source in line.split()[:-1]]


@pytest.mark.parametrize("source", copied())
def test_copied_files_exist_and_are_not_ignored(source):
    assert (ROOT / source).exists()
    ignore = (ROOT / "launch" / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    assert f"!{source}" in ignore


def test_packages_of_the_project_are_all_copied():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packages = setup["options.packages.find"]["include"].replace("*", "").split()
    assert set(packages) <= set(copied())
    assert setup["metadata"]["long_description"].removeprefix("file: ") in copied()
    assert setup["metadata"]["license_files"] in copied()
    (install,) = (line for line in instructions("RUN") if "pip install" in line)
    extras = re.search(r"-e \"\.\[(.*?)\]\"", install)[1].split(",")
    assert "-c constraints.txt" in install and set(extras) <= set(setup["options.extras_require"])


def test_base_image_has_the_pinned_torch():
    (base,) = instructions("FROM")
    torch = re.search(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert re.fullmatch(rf"pytorch/pytorch:{re.escape(torch)}-cuda[\d.]+-cudnn9-devel", base)


def test_image_does_not_run_as_root_and_is_checked_as_its_user():
    names = [line.split(" ")[0] for line in INSTRUCTIONS if line]
    assert instructions("USER") == ["drpo"]
    checked = INSTRUCTIONS.index("RUN drpo env")
    assert INSTRUCTIONS.index("USER drpo") < checked and "RUN" not in names[names.index("CMD") :]


def test_command_that_the_file_names_is_one_of_ours():
    assert "drpo launch --accelerate zero2 drpo tldr/drpo_2.8b.yaml" in DOCKERFILE
    assert (ROOT / "launch" / "accelerate" / "zero2.yaml").exists()
    assert (ROOT / "launch" / "recipes" / "tldr" / "drpo_2.8b.yaml").exists()
