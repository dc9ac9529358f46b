"""Two books side by side: every way in which they can differ is found, and nothing is said of what agrees."""

import os
from dataclasses import replace

import pytest

from hpckv.store.policy import StorePolicy
from hpckv.store.root import StoreRoot
from hpckv.usage.bounds import flops_per_token, most_tokens_per_s
from hpckv.usage.gather import gather
from hpckv.usage.ledger import LedgerFile
from hpckv.usage.reconcile import Known, LedgerStart, Part, SlurmStart, ledger_starts, reconcile
from hpckv.usage.record import Counters, Record

T = 1_790_900_000.0
CLUSTER = "east"
LLAMA_8B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336,
}  # fmt: skip


def slurm(job: str = "7", **more) -> SlurmStart:
    """A start of ten minutes on one GPU."""
    whole = SlurmStart(
        cluster=CLUSTER, job=job, job_id=job, uid=1001, user="alice", account="vision", partition="gpu", qos="normal",
        state="COMPLETED", exit_code="0:0", start=T, end=T + 600, elapsed_s=600, gpus=1, energy_j=None, comment="",
        restarts=None, is_ours=True,
    )  # fmt: skip
    return replace(whole, **more)


def part(**more) -> Part:
    whole = Part(
        gpu="NVIDIA H100",
        num_gpus=1,
        model="m",
        model_digest="d",
        t0=T + 30,
        t1=T + 590,
        gpu_s=560.0,
        tokens=100,
        energy_j=None,
    )
    return replace(whole, **more)


def ledger(job: str = "7", *parts: Part, **more) -> LedgerStart:
    whole = LedgerStart(CLUSTER, job, job, 0, 1001, "vision", "gpu", is_in_window=True, parts=list(parts or (part(),)))
    return replace(whole, **more)


KNOWN = Known(cluster=CLUSTER, own_uid=1001, excused="hpckv nothing", name_of=lambda uid: f"user{uid}")


def found(ledgers, slurms, known: Known = KNOWN) -> list[tuple[str, str]]:
    return [(one.kind, one.job_id) for one in reconcile(ledgers, slurms, known).findings]


def test_what_agrees_is_not_a_finding():
    result = reconcile([ledger()], [slurm()], KNOWN)
    assert result.findings == []
    (pair,) = result.pairs
    assert (pair.gpu_s, pair.used_gpu_s, pair.idle_percent) == (600, 560.0, pytest.approx(100 * 40 / 600))


def test_a_job_in_one_book_only():
    assert found([ledger("8")], [slurm("7", is_ours=False)]) == [("not_in_sacct", "8")]
    assert found([], [slurm()]) == [("not_in_ledger", "7")]


@pytest.mark.parametrize(
    "more",
    [
        {"is_ours": False},  # nothing says that it is ours
        {"end": None, "state": "RUNNING"},  # it may still be loading its model
        {"start": None, "state": "PENDING"},
        {"start": None, "end": T, "state": "CANCELLED"},  # it never began
        {"state": "FAILED", "exit_code": "66:0"},  # a run file that is not there
        {"comment": "hpckv nothing"},
    ],
)
def test_jobs_that_need_no_ledger(more):
    assert found([], [slurm(**more)]) == []


@pytest.mark.parametrize("more", [{"state": "CANCELLED", "exit_code": "0:15"}, {"state": "FAILED", "exit_code": "1:0"}])
def test_jobs_that_were_killed_before_their_first_record_are_found(more):
    assert found([], [slurm(**more)]) == [("not_in_ledger", "7")]


def test_a_job_is_ours_by_its_step_its_comment_or_a_run_directory():
    others = slurm(is_ours=False)
    assert found([], [replace(others, comment="hpckv hit=1.0% hits=1")]) == [("not_in_ledger", "7")]
    assert found([], [others], replace(KNOWN, named=frozenset({"7"}))) == [("not_in_ledger", "7")]
    assert found([], [others]) == []


def test_a_ledger_that_goes_beyond_its_job_is_found_and_clocks_may_differ_a_little():
    assert found([ledger("7", part(t0=T - 4, t1=T + 604))], [slurm()]) == []
    assert found([ledger("7", part(t1=T + 700))], [slurm(is_ours=False)]) == [("outside_the_job", "7")]
    assert found([ledger("7", part(t0=T - 60))], [slurm(is_ours=False)]) == [("outside_the_job", "7")]


def test_each_start_of_a_requeued_job_has_its_own_ledger():
    first, second = slurm(state="REQUEUED"), slurm(start=T + 700, end=T + 900, elapsed_s=200)
    records = [ledger(), ledger("7", part(t0=T + 710, t1=T + 890, gpu_s=180.0), restart=1)]
    result = reconcile(records, [second, first], KNOWN)
    assert result.findings == []
    assert [(pair.restart, pair.slurm.state, pair.used_gpu_s) for pair in result.pairs] == [
        (0, "REQUEUED", 560.0),
        (1, "COMPLETED", 180.0),
    ]
    assert found(records[:1], [first, second]) == [("not_in_ledger", "7")]
    assert found(records[1:], [first, second]) == [("not_in_ledger", "7")]


def test_a_number_that_slurm_gave_twice_is_two_jobs():
    year_ago = slurm(start=T - 3e7, end=T - 3e7 + 600, is_ours=False, user="bob", uid=1002)
    assert found([ledger()], [year_ago, slurm()]) == []


def test_another_user_s_or_account_s_job_is_found():
    assert found([ledger(uid=1002)], [slurm()]) == [("another_user", "7")]
    assert found([ledger(account="nlp")], [slurm()]) == [("another_account", "7")]
    assert found([ledger(account=None)], [slurm()]) == []


def test_whose_jobs_slurm_does_not_show_are_one_finding():
    result = reconcile([ledger("8", uid=1002), ledger("9", uid=1002), ledger()], [slurm()], KNOWN)
    (finding,) = result.findings
    assert (finding.kind, finding.uid) == ("not_in_sacct", 1002)
    assert "no job of user1002, the ledger has 2 starts" in finding.what
    assert found([ledger("8")], []) == [("not_in_sacct", "8")]  # one's own are shown


def test_other_clusters_and_records_before_the_window_are_not_compared():
    result = reconcile([ledger("8", cluster="west"), ledger("9", is_in_window=False)], [], KNOWN)
    assert (result.findings, result.elsewhere) == ([], 1)


def test_gpus_that_were_paid_for_and_never_used():
    assert found([ledger()], [slurm(gpus=4)]) == [("unused_gpus", "7")]
    assert found([ledger("7", part(gpu="cpu"))], [slurm()]) == [("unused_gpus", "7")]
    assert found([ledger("7", part(num_gpus=2), part(num_gpus=2))], [slurm(gpus=4)]) == []
    one_after_another = (part(t1=T + 300), part(t0=T + 300))
    assert found([ledger("7", *one_after_another)], [slurm(gpus=2)]) == [("unused_gpus", "7")]
    assert found([ledger("7", part(num_gpus=2))], [slurm()]) == [("more_gpus", "7")]


def test_where_slurm_counts_no_gpus_that_is_counted():
    result = reconcile([ledger(), ledger("8", part(gpu="cpu"))], [slurm(gpus=0), slurm("8", gpus=0)], KNOWN)
    assert (result.findings, result.untracked) == ([], 1)


def test_no_gpu_is_faster_than_its_data_sheet():
    flops = flops_per_token(LLAMA_8B)
    assert flops == pytest.approx(2 * 6.98e9, rel=1e-3)
    most = most_tokens_per_s("NVIDIA H100 80GB HBM3", 2, flops)
    assert most == pytest.approx(2 * 1979e12 / flops)
    known = replace(KNOWN, flops={"d": flops})
    assert found([ledger("7", part(tokens=int(560 * most / 2) - 1))], [slurm()], known) == []
    assert found([ledger("7", part(tokens=int(560 * most / 2) + 9))], [slurm()], known) == [("too_fast", "7")]


def test_of_an_unknown_device_or_model_no_speed_is_said():
    flops = {"d": 1.0}
    for one, known in ((part(gpu="Abacus"), replace(KNOWN, flops=flops)), (part(), KNOWN)):
        result = reconcile([ledger("7", replace(one, tokens=10**15))], [slurm()], known)
        assert (result.findings, result.unbounded) == ([], 1)
    for wrong in (
        {},
        {"hidden_size": "x"},
        {**LLAMA_8B, "num_attention_heads": 0},
        {**LLAMA_8B, "intermediate_size": -(9**9)},
    ):
        assert flops_per_token(wrong) is None


def test_starts_of_the_ledger_are_its_writers_together(tmp_path):
    store = StoreRoot.create(tmp_path / "store", StorePolicy.new())
    for restart, joules in (("0", 5.0), ("1", None)):
        for _ in range(2):  # replicas
            environ = {
                "SLURM_JOB_ID": "12",
                "SLURM_ARRAY_JOB_ID": "10",
                "SLURM_ARRAY_TASK_ID": "2",
                "SLURM_RESTART_COUNT": restart,
            }
            pattern = Record.of_this_process(environ=environ, gpu="NVIDIA H100", num_gpus=2)
            t = T + 1000 * int(restart)
            make = lambda path: path.mkdir(parents=True, exist_ok=True)  # noqa: E731
            file = LedgerFile(store.layout.ledger(os.getuid()), pattern, make, now=t)
            for n in (60, 120):
                more = Counters(
                    requests=1, computed_tokens=4, prompt_tokens=4, output_tokens=1, gpu_s=120.0, energy_j=joules
                )
                file.append(more, now=t + n)
            file.close()
    alone = LedgerFile(store.layout.ledger(os.getuid()), Record.of_this_process(environ={}), make, now=T)
    alone.append(Counters(), now=T + 1)
    alone.close()
    starts, num_without = ledger_starts(gather([store.layout.root], [], 0, T + 1e6), T + 1000, T + 2000)
    assert num_without == 0
    assert ledger_starts(gather([store.layout.root], [], 0, T + 1e6), T, T + 2000)[1] == 1
    assert [(s.job, s.job_id, s.restart, s.is_in_window) for s in starts] == [
        ("12", "10_2", 0, False),
        ("12", "10_2", 1, True),
    ]
    assert [(s.t0, s.t1, s.gpu_s, s.gpus) for s in starts] == [(T, T + 120, 480, 4), (T + 1000, T + 1120, 480, 4)]
    assert [p.tokens for p in starts[0].parts] == [10, 10]
    assert [p.energy_j for s in starts for p in s.parts] == [10.0, 10.0, None, None]
