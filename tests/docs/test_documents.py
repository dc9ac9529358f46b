"""Documents that can go stale: the generated configuration, links, and the words that must not appear."""

import re
import runpy
import subprocess
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent.parent


def test_configuration_md_is_current_and_every_key_is_explained():
    made = runpy.run_path(str(TOP / "docs" / "make_configuration.py"))["render"]()
    assert (TOP / "docs" / "configuration.md").read_text() == made, "run `make docs`"
    assert "|  |\n" not in made


@pytest.mark.parametrize(
    "document",
    [p.relative_to(TOP) for p in [TOP / "README.md", *TOP.glob("docs/*.md"), *TOP.glob("examples/**/*.md")]],
    ids=str,
)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)", (TOP / document).read_text()):
        if not target.startswith("http"):
            assert (TOP / document).parent.joinpath(target).exists(), target


def test_the_example_run_file_is_valid():
    from hpckv.workload.runfile import load_run

    config = load_run(TOP / "examples" / "demo.yaml")
    assert (TOP / config.input).exists()
    assert (TOP / config.model.path / "config.json").exists()


def test_shell_scripts_parse():
    for script in [TOP / ".ci" / "run"]:
        assert subprocess.run(["bash", "-n", script]).returncode == 0
