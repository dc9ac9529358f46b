"""As ordinary users of a centre, in a real image: a run over two hosts, a colleague's prefixes, an array that loses a job."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.cli.runs import answers, chat_lines, texts, write_run
from tests.cluster.processes import send, workers
from tests.cluster.site import Site

pytestmark = [pytest.mark.root, pytest.mark.slurm, pytest.mark.sharedfs, pytest.mark.mpi, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def model(site: Site, checkpoint) -> Path:
    """Where a project keeps it: everybody may read it."""
    folder = site.shared / "models" / "llama"
    shutil.copytree(checkpoint("llama", tokenizer=True, num_key_value_heads=2), folder)
    for path in (folder.parent, folder, *folder.iterdir()):
        path.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def shared_image(site: Site, sif: Path) -> Path:
    """On the shared filesystem, like a project's."""
    place = site.shared / "hpckv.sif"
    shutil.copy(sif, place)
    place.chmod(0o755)
    return place


@pytest.fixture(scope="module")
def store(site: Site, shared_image: Path) -> Path:
    """Of the project vision, which alice has made."""
    folder = site.shared / "vision-kv"
    folder.mkdir()
    alice = site.people["alice"]
    shutil.chown(folder, alice.name, alice.group)
    folder.chmod(0o2750)
    done = hpckv(site, shared_image, "alice", "store", "init", folder / "store", "--group", alice.group)
    assert done.returncode == 0, done.stderr
    return folder / "store"


def hpckv(site: Site, shared_image: Path, who: str, *arguments: object):
    """On the login node."""
    return site.run(who, "apptainer", "exec", "--bind", site.shared, shared_image, "hpckv", *arguments)


def a_run(site: Site, who: str, name: str, model: Path, lines: list[dict], tokens: int = 4, **sections) -> Path:
    member = site.people[who]
    folder = member.home / name
    folder.mkdir()
    run_file = write_run(folder, model, lines, sampling={"max_tokens": tokens, "ignore_eos": True}, **sections)
    for path in (folder, run_file, folder / "in.jsonl"):
        shutil.chown(path, member.name, member.group)
    return run_file


def summary(run_file: Path) -> dict:
    return json.loads((run_file.parent / "out" / "summary.json").read_text())


def test_500_requests_over_two_hosts_and_again_from_the_shared_filesystem(site: Site, model, shared_image, store):
    shares = {"store": {"shared": str(store), "local": "none", "write": "all"}}
    layout = ("--partition=a100", "--nodes=2", "--ntasks-per-node=2")
    found = {}
    for name in ("first", "second"):
        run_file = a_run(site, "alice", name, model, chat_lines(500, heads=10), **shares)
        job = site.sbatch("alice", "multinode_tp_pp.sh", run_file, flags=layout, HPCKV_SIF=str(shared_image))
        assert site.wait(job) == {("COMPLETED", "0:0")}, site.logs()
        found[name] = summary(run_file)
        moments = found[name]["times"]  # what bench/first_token.py adds up
        assert {"script", "step", "task", "process", "run", "imported", "checked", "loaded", "first_answer"} <= set(
            moments
        )
        assert list(moments.values()) == sorted(moments.values())
        assert set(answers(run_file.parent)) == {f"q{n}" for n in range(500)}
        hosts = json.loads((run_file.parent / "out" / "provenance.json").read_text())["hosts_of_ranks"]
        assert hosts == ["a100-0"] * 2 + ["a100-1"] * 2
        assert site.accounted(job) == [f"{site.people['alice'].name}|vision|COMPLETED|0:0|2"]
    assert found["first"]["cached"]["shared"] == 0
    assert found["second"]["cached"]["shared"] > 0
    assert texts(site.people["alice"].home / "first") == texts(site.people["alice"].home / "second")


def test_a_colleague_hits_what_was_computed_and_another_project_sees_nothing(site: Site, model, shared_image, store):
    lines = [{**line, "custom_id": f"again-{line['custom_id']}"} for line in chat_lines(6, heads=2)]
    shares = {"store": {"shared": str(store), "local": "none", "write": "all"}}
    flags = ("--partition=all", "--exclude=a100-1")
    hits, jobs = {}, {}
    for who in ("alice", "bob"):
        run_file = a_run(site, who, "same", model, lines, **shares)
        jobs[who] = site.sbatch(who, "single_a100.sh", run_file, flags=flags, HPCKV_SIF=str(shared_image))
        assert site.wait(jobs[who]) == {("COMPLETED", "0:0")}, site.logs()
        hits[who] = summary(run_file)["cached"]["shared"]
    assert hits["bob"] > 0
    assert texts(site.people["alice"].home / "same") == texts(site.people["bob"].home / "same")
    columns = "User,Account,Partition,PromptTok,SharedTok,OwnTok,OthersTok,Computed"
    for who, job in jobs.items():  # each asks about both: what a member's job did is the project's to know
        asked = hpckv(site, shared_image, "bob", "acct", "--store", store, "-a", "-j", job, "-o", columns, "--json")
        assert asked.returncode == 0, asked.stderr
        (row,) = json.loads(asked.stdout)["rows"]
        usages = [body["usage"] for body in answers(site.people[who].home / "same").values()]
        assert row["PromptTok"] == sum(usage["prompt_tokens"] for usage in usages)
        assert row["Computed"] == sum(usage["hpckv"]["computed"] for usage in usages)
        assert (row["Account"], row["Partition"], row["SharedTok"]) == ("vision", "all", hits[who])
        assert (row["OwnTok"], row["OthersTok"]) == ((0, hits[who]) if who == "bob" else (hits[who], 0))
    asked = hpckv(site, shared_image, "carol", "acct", "--store", store, "-a", "-S", "now-1day")
    assert (asked.returncode, asked.stdout) == (77, "")
    listed = site.run("carol", "ls", store)
    assert (listed.returncode, listed.stdout) == (2, "")
    assert "Permission denied" in listed.stderr
    run_file = a_run(site, "carol", "same", model, lines, **shares)
    job = site.sbatch("carol", "single_a100.sh", run_file, flags=flags, HPCKV_SIF=str(shared_image))
    assert site.wait(job) == {("FAILED", "77:0")}, site.logs()
    assert "permission" in "".join(path.read_text() for path in site.people["carol"].home.glob("log-*")).lower()


def test_every_script_does_what_it_says(site: Site, model, shared_image, store):
    run_file = a_run(site, "alice", "scripts", model, chat_lines(6), store={"shared": str(store), "local": "none"})
    out = run_file.parent / "out"

    def submit(script: str, *arguments: object, partition: str = "all", **env: str) -> set[tuple[str, str]]:
        job = site.sbatch(
            "alice", script, *arguments, flags=(f"--partition={partition}",), HPCKV_SIF=str(shared_image), **env
        )
        return site.wait(job)

    assert submit("warm_prefix.sh", store, "--run", run_file) == {("COMPLETED", "0:0")}, site.logs()
    assert submit("single_v100.sh", run_file) == {("COMPLETED", "0:0")}, site.logs()
    host = json.loads((out / "provenance.json").read_text())
    assert (host["host"], host["model"]["dtype"]) == ("v100-0", "float16")
    elsewhere = {"HPCKV_RUN_DIR": str(run_file.parent / "h100")}
    assert submit("single_h100_fp8.sh", run_file, **elsewhere) == {("FAILED", "78:0")}, site.logs()
    as_it_is = {**elsewhere, "HPCKV_QUANTIZATION": "none"}
    assert submit("single_h100_fp8.sh", run_file, **as_it_is) == {("COMPLETED", "0:0")}, site.logs()
    assert json.loads((run_file.parent / "h100" / "provenance.json").read_text())["host"] == "h100-0"
    measured = submit("bench_load_or_recompute.sh", run_file, "--lengths", "32,64", "--size", "16MiB")
    assert measured == {("COMPLETED", "0:0")}, site.logs()
    assert "prefill_tokens_per_s: " in site.logs()
    disk = site.cluster.folder / "tmp" / "v100-0"
    staged = submit("stage_model.sh", model, partition="v100", HPCKV_LOCAL=str(disk))
    assert staged == {("COMPLETED", "0:0")}, site.logs()
    (copy,) = disk.glob("hpckv-models-*/*/.complete")
    assert (copy.parent / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert submit("store_gc.sh", store) == {("COMPLETED", "0:0")}, site.logs()
    assert submit("acct_rollup.sh", store) == {("COMPLETED", "0:0")}, site.logs()
    ((state, _),) = submit("doctor.sh", store)
    assert state in ("COMPLETED", "FAILED")  # of a machine that is not right it says so by its exit code
    assert "write, fsync, rename, link and read are right" in " ".join(site.logs().split())


def test_every_kind_of_gpu_works_on_one_run(site: Site, model, shared_image):
    run_file = a_run(site, "alice", "pool", model, chat_lines(120), tokens=16, queue={"lease_s": 6})
    alice = site.people["alice"]
    pools = {kind.upper(): f"{kind} 0-0 {shared_image}" for kind in ("v100", "a100", "h100")}
    small = f"--mem=1000M --cpus-per-task=1 --gpus-per-node=0 --time=20 --parsable --output={alice.home}/log-pool-%j"
    env = {f"HPCKV_{name}": pool for name, pool in pools.items()} | {"HPCKV_ACCOUNT": "vision", "HPCKV_SBATCH": small}
    done = site.run("alice", "bash", site.home / "slurm" / "mixed_gpu_pool.sh", run_file, env=env)
    assert done.returncode == 0, done.stderr
    jobs = done.stdout.split()
    assert [site.wait(job) for job in jobs] == [{("COMPLETED", "0:0")}] * 3, site.logs()
    assert set(answers(run_file.parent)) == {f"q{n}" for n in range(120)}
    assert summary(run_file)["requests"] == 120
    hosts = {json.loads(path.read_text())["host"] for path in (run_file.parent / "out" / "logs").glob("provenance-*")}
    assert {"v100-0", "h100-0"} <= hosts


def tokens_of(body: dict) -> int:
    """What an answer took."""
    return int(body["usage"]["hpckv"]["computed"] + body["usage"]["completion_tokens"])


def test_an_array_loses_a_job_and_gets_another_late(site: Site, model, shared_image, store):
    count = 700
    run_file = a_run(
        site,
        "alice",
        "array",
        model,
        chat_lines(count, heads=4),
        tokens=24,
        queue={"lease_s": 6, "items": 64},
        engine={"max_requests": 2},
    )
    out = run_file.parent / "out"
    array = site.sbatch(
        "alice", "array_replicas.sh", run_file, flags=("--partition=all", "--array=0-2"), HPCKV_SIF=str(shared_image)
    )

    def by_worker() -> dict[str, int]:
        parts = out.glob("queue/1/parts/*.jsonl")
        return {part.name: part.read_bytes().count(b"\n") for part in parts}

    end = time.monotonic() + 240
    while sum(count > 3 for count in by_worker().values()) < 3:
        assert time.monotonic() < end, site.logs()
        time.sleep(0.1)
    items = json.loads((out / "queue" / "1" / "plan.json").read_text())["items"]
    send(workers(SLURM_ARRAY_JOB_ID=array, SLURM_ARRAY_TASK_ID="1"), signal.SIGKILL)  # as for want of memory: no word
    (part,) = out.glob(f"queue/1/parts/{array}_1.*.jsonl")
    whole = [line for line in part.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    spent = sum(tokens_of(json.loads(line)["response"]["body"]) for line in whole)
    late = site.sbatch(
        "alice", "array_replicas.sh", run_file, flags=("--partition=all", "--array=3"), HPCKV_SIF=str(shared_image)
    )
    site.wait(late)
    site.wait(array)
    states = [row.split("|")[2].split()[0] for row in site.accounted(array) + site.accounted(late)]
    assert sorted(states) == ["COMPLETED", "COMPLETED", "COMPLETED", "FAILED"], site.logs()
    bodies = answers(run_file.parent)
    assert set(bodies) == {f"q{n}" for n in range(count)}
    done = summary(run_file)
    assert len(done["workers"]) == 3  # the late one too
    assert done["requests"] < count  # what the one that was killed had answered counts
    # Not what the answers say, of which each is there once, but what everybody computed.
    names = ("prefill_tokens", "decode_tokens", "recomputed_tokens")
    spent += sum(worker["scheduler"][name] for worker in done["workers"].values() for name in names)
    least = json.loads((out / "plan.json").read_text())["least_prefill_tokens"] + 24 * count
    assert spent <= 1.05 * least, f"{spent} tokens, and {least} are needed"
    # Nobody is left alone with the end of the run: the last to end has no more than an item after the others.
    ended = [worker["times"]["last_answer"] for worker in done["workers"].values()]
    slowest = max(worker["answering_seconds"] / worker["requests"] for worker in done["workers"].values())
    item_s = slowest * max(len(item["ids"]) for item in items)
    assert max(ended) - min(ended) <= item_s, f"{ended}, and an item takes {item_s:.1f} s"
