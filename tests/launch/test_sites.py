"""Site files: every one is read by the code that runs read it with, and the example has every key."""

import os
import re
import subprocess

import pytest
import yaml

from hpckv.errors import HpckvError
from hpckv.launch.submit import SubmitOptions, load_submit, prepare
from hpckv.usage.points import CachePrices, PointsConfig, Price, read_points
from hpckv.workload.queue import QueueConfig
from hpckv.workload.runfile import ContainerConfig, SlurmConfig, StoreConfig
from tests.cli.runs import write_run
from tests.launch.batch import Batch
from tests.launch.scripts import LINE, TOP

MODEL = TOP / "examples" / "recall-1m"
FILES = sorted((TOP / "sites").glob("*.yaml"))
CODE = sorted((TOP / "slurm" / "site").glob("*.sh"))
SET = re.compile(r"^( *)#([a-z_]+:|- )", re.MULTILINE)
"""A setting that is commented out; words are `# Words`."""


def script(folder, site, **sections):
    """What would be submitted."""
    run_file = write_run(folder, MODEL, LINE, site=str(site), **sections)
    return prepare(load_submit(run_file, flags={}, environ={}), SubmitOptions(), folder, needs_slurm=False)


def keys(config):
    return set(config.__struct_fields__)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_site_file_is_read_by_runs_and_by_the_accounting(tmp_path, path):
    assert "#SBATCH" in script(tmp_path, path).text
    read_points(path)
    assert path.read_text().startswith("# ")


def test_the_example_changes_nothing_as_it_stands(tmp_path):
    found = script(tmp_path, TOP / "sites" / "example.yaml").script.config
    without = prepare(
        load_submit(write_run(tmp_path, MODEL, LINE), flags={}, environ={}),
        SubmitOptions(),
        tmp_path,
        needs_slurm=False,
    )
    for name in keys(found) - {"site", "slurm", "container"}:
        assert getattr(found, name) == getattr(without.script.config, name)
    assert (found.slurm, found.container) == (SlurmConfig(), ContainerConfig())
    assert read_points(TOP / "sites" / "example.yaml") == PointsConfig()


def test_the_example_has_every_key_each_with_a_word(tmp_path):
    text = (TOP / "sites" / "example.yaml").read_text()
    whole = tmp_path / "whole.yaml"
    whole.write_text(SET.sub(r"\1\2", text))
    content = yaml.safe_load(whole.read_text())
    sections = {"slurm": SlurmConfig, "container": ContainerConfig, "store": StoreConfig, "queue": QueueConfig}
    for name, config in sections.items():
        assert set(content["defaults"][name]) >= keys(config) - {"items", "site_local"}, name
    assert set(content["points"]) == keys(PointsConfig)
    assert set(content["points"]["cache"]) == keys(CachePrices)
    assert {key for price in content["points"]["prices"] for key in price} == keys(Price)
    assert set(content["rates"][0]) == {"gpu", "model", "prefill_tokens_per_s", "decode_tokens_per_s", "date"}
    for line in text.splitlines():
        assert line.strip() in ("", "#") or line.lstrip().startswith("# ") or " # " in line or line[-1] in ":}", line
    # Which is also what a run may be told, as far as keys do not exclude each other.
    for key in ("array", "dependency"):
        del content["defaults"]["slurm"][key]
    del content["defaults"]["container"]["image"]
    whole.write_text(yaml.safe_dump(content))
    asked = script(tmp_path, whole).text
    for wanted in (
        "--account=gk77",
        "--gres=gpu:a100:1",
        "--signal=B:USR1@120",
        "--wckey=eval",
        "module load apptainer",
    ):
        assert wanted in asked
    assert read_points(whole).price_sql[0].count("WHEN") == 2


def test_a_section_with_a_wrong_name_is_refused(tmp_path):
    (tmp_path / "site.yaml").write_text("default: {}\n")
    with pytest.raises(HpckvError, match="default: unknown section; a site file has defaults, points, rates"):
        script(tmp_path, tmp_path / "site.yaml")


def test_a_site_without_the_usual_options_gets_its_own(tmp_path):
    text = script(tmp_path, TOP / "sites" / "kyoto-rsc.yaml").text
    assert "#SBATCH --rsc p=1:t=8:c=8:m=64G\n" in text
    assert not re.search("#SBATCH --(nodes|ntasks|cpus|mem)", text)


def sourced(code, then, **environ):
    """What bash says after it has sourced a site's code where sbatch is called."""
    known = {"PATH": os.environ["PATH"], "HOME": "/nowhere", **environ}
    command = ["bash", "-euc", f'. "$1"; {then}', "bash", str(code)]
    done = subprocess.run(command, env=known, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("code", CODE, ids=lambda path: path.stem)
def test_a_sites_code_goes_before_sbatch_and_into_the_job(tmp_path, code):
    assert sourced(code, 'echo "$HPCKV_SITE_SH"') == f"{code}\n"
    one = Batch(tmp_path, is_submitted=True)
    started = one.start('echo "local ${HPCKV_LOCAL:-} mpi"', HPCKV_SITE_SH=str(code))
    assert (started.returncode, "SBATCH" in started.stdout) == (0, False), started.stderr


def test_what_a_site_says_for_the_job_holds_there(tmp_path):
    (tmp_path / "site.sh").write_text(
        'if [ -z "${hpckv_in_job:-}" ]; then export SBATCH_ACCOUNT=proj; else export HPCKV_LOCAL=/disk HPCKV_MPI=pmix; fi\n'
    )
    one = Batch(tmp_path)
    done = one.start('echo "${SBATCH_ACCOUNT:-} $HPCKV_LOCAL"; answer', HPCKV_SITE_SH=str(tmp_path / "site.sh"))
    assert done.stdout == " /disk\n"
    assert "--mpi=pmix" in one.called("srun")


def test_a_chain_asks_as_the_site_does(tmp_path):
    (tmp_path / "site.sh").write_text('[ -n "${hpckv_in_job:-}" ] || export SBATCH_ACCOUNT=proj\n')
    one = Batch(tmp_path, {"HPCKV_CONTINUE": "chain"})
    done = one.start("answer; exit 75", HPCKV_SITE_SH=str(tmp_path / "site.sh"), SBATCH_ACCOUNT="stale")
    assert done.returncode == 0, done.stderr
    assert "SBATCH_ACCOUNT=proj" in one.called("sbatch.env")


def test_a_sites_code_may_use_what_is_not_set_and_end_as_it_likes(tmp_path):
    (tmp_path / "site.sh").write_text("export LD_LIBRARY_PATH=/x:$LD_LIBRARY_PATH\nfalse\n")
    one = Batch(tmp_path)
    done = one.start('echo "$LD_LIBRARY_PATH"', HPCKV_SITE_SH=str(tmp_path / "site.sh"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "/x:\n", "")


POOLS = {"HPCKV_V100": "gpu 0-1 -", "HPCKV_A100": "gpu 0-3 -", "HPCKV_H100": "gpu 0 -"}


def test_a_pool_of_arrays_goes_off_whatever_the_sites_code_is_and_shares_one_budget(tmp_path):
    (tmp_path / "site.sh").write_text("export SBATCH_QOS=q:$NOT_SET\nfalse\n")
    one = Batch(tmp_path)
    one.program("sbatch", '#!/bin/bash\nprintf "%s\\n" "$HPCKV_POOL" "$SBATCH_QOS" >>"$CALLS/sbatch"\n')
    pool = ["bash", str(TOP / "slurm" / "mixed_gpu_pool.sh"), "run.yaml"]
    environ = {**one.environ(1), **POOLS, "HPCKV_ACCOUNT": "proj"}

    def submitted(site):
        return subprocess.run(pool, env={**environ, "HPCKV_SITE_SH": site}, capture_output=True, text=True, check=False)

    done = submitted(str(tmp_path / "site.sh"))
    assert (done.returncode, done.stderr) == (0, "")
    name = one.called("sbatch")[0]
    assert one.called("sbatch") == [name, "q:"] * 3
    assert submitted(str(tmp_path / "site.sh")).returncode == 0
    assert one.called("sbatch")[-2] not in ("", name)  # another call has another budget
    missing = submitted("/no/site.sh")
    assert (missing.returncode, missing.stderr) == (66, "hpckv: HPCKV_SITE_SH=/no/site.sh: no such file\n")
    assert len(one.called("sbatch")) == 12


def test_where_the_sites_code_is_not_there_the_job_says_so(tmp_path):
    done = Batch(tmp_path).start("answer", HPCKV_SITE_SH="/no/site.sh")
    assert done.returncode == 66
    assert "HPCKV_SITE_SH=/no/site.sh: no such file on " in done.stderr
