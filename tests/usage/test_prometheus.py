"""The textfile says what the ledger says: read back by Prometheus's own parser."""

import os
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hpckv.errors import CannotWriteError, ConfigError
from hpckv.store.policy import StorePolicy
from hpckv.store.root import StoreRoot
from hpckv.usage.gather import gather
from hpckv.usage.ledger import LedgerFile
from hpckv.usage.points import PointsConfig, Price
from hpckv.usage.prometheus import METRICS, textfile, write_textfile
from hpckv.usage.record import Counters, Record

NOW = datetime(2026, 10, 5, tzinfo=UTC).timestamp()


@pytest.fixture
def store(tmp_path) -> StoreRoot:
    return StoreRoot.create(tmp_path / "store", StorePolicy.new())


def work(store: StoreRoot, counters: Counters, **more) -> None:
    account = more.pop("account", "")
    environ = {"SLURM_JOB_ID": "7"} | ({} if account is None else {"SLURM_JOB_ACCOUNT": account})
    pattern = Record.of_this_process(environ=environ, **{"model": "small", "gpu": "NVIDIA H100", **more})
    folder = store.layout.ledger(os.getuid())
    file = LedgerFile(folder, pattern, lambda path: path.mkdir(parents=True, exist_ok=True), now=NOW)
    file.append(counters, now=NOW + 60)
    file.close()


def lines(store: StoreRoot, name_of=lambda uid: f"user{uid}", points: PointsConfig | None = None) -> list[str]:
    return list(
        textfile(gather([store.layout.root], [], 0, NOW + 1e6), points or PointsConfig(), name_of, 0, NOW + 1e6)
    )


def samples(text: list[str]) -> dict:
    """(name, labels) -> value, as Prometheus understands it; families have their types and helps."""
    found = {}
    for family in text_string_to_metric_families("".join(f"{line}\n" for line in text)):
        assert family.documentation
        assert family.type in ("counter", "gauge")
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter")
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def test_sums_by_user_account_project_model_gpu_and_tier(store):
    for model in ("small", "small", "large"):
        tokens = {"device": 4, "shared": 2}
        counted = Counters(
            requests=1, prompt_tokens=10, cached=tokens, computed_tokens=4, output_tokens=3, written_tokens=8,
            read_bytes={"shared": 64}, written_bytes={"shared": 256}, gpu_s=3600.0, saved_gpu_s=-1.5, energy_j=7.5,
        )  # fmt: skip
        work(store, counted, model=model, account="gk77", project="vision")
    points = PointsConfig(prices=[Price(per_gpu_hour=2.0)])
    found = samples(lines(store, points=points))
    own = {"user": f"user{os.getuid()}", "account": "gk77", "project": "vision", "model": "small", "gpu": "NVIDIA H100"}

    def of(name: str, **more: str) -> float:
        return found[f"hpckv_{name}", frozenset({**own, **more}.items())]

    assert (of("requests_total"), of("prompt_tokens_total"), of("computed_tokens_total")) == (2, 20, 8)
    assert (of("requests_total", model="large"), of("output_tokens_total"), of("written_tokens_total")) == (1, 6, 16)
    tiers = [of("cached_tokens_total", tier=tier) for tier in ("device", "host", "local", "shared")]
    assert tiers == [8, 0, 0, 4]
    assert (of("read_bytes_total", tier="shared"), of("written_bytes_total", tier="shared")) == (128, 512)
    assert (of("gpu_seconds_total"), of("saved_gpu_seconds"), of("points")) == (7200, -3, 4)
    assert of("energy_joules_total") == 15
    assert of("last_record_timestamp_seconds") == NOW + 60
    assert found["hpckv_ledger_oddities", frozenset()] == 0
    assert {name for name, _ in found} == {metric.name for metric in METRICS} | {"hpckv_ledger_oddities"}


def test_what_is_not_known_has_no_line(store):
    work(store, Counters(requests=1))
    names = {name for name, _ in samples(lines(store))}
    assert "hpckv_requests_total" in names
    assert names.isdisjoint({"hpckv_energy_joules_total", "hpckv_points", "hpckv_saved_points"})


@pytest.mark.parametrize(
    "name",
    [
        'a"b',
        "a\\",
        'a\\"} 7',
        "a\nhpckv_requests_total 9",
        'x"} 1\n# TYPE y counter',
        "日本語",
        "a,b={}",
        "#",
        "\\n",
        "",
    ],
)
def test_a_name_is_a_name_whatever_is_in_it(store, name):
    work(store, Counters(requests=3), model=name, account=name)
    found = samples(lines(store, name_of=lambda _: name))
    ((_, labels),) = [key for key in found if key[0] == "hpckv_requests_total"]
    assert dict(labels) == {"user": name, "account": name, "project": "", "model": name, "gpu": "NVIDIA H100"}
    assert {value for (n, _), value in found.items() if n == "hpckv_requests_total"} == {3}


def test_what_a_terminal_or_a_parser_may_take_for_a_line_s_end_is_not_there(store):
    work(store, Counters(requests=3), model="a\r\x85\u2028\x1b[2Jb")
    assert 'model="a????[2Jb"' in "".join(lines(store))


def test_names_that_no_label_tells_apart_are_one_series(store):
    for account in ("a\x01", "a\x02", None, ""):
        work(store, Counters(requests=3, gpu_s=1.5), account=account)
    found = samples(lines(store))
    sums = {dict(labels)["account"]: value for (name, labels), value in found.items() if name == "hpckv_requests_total"}
    assert sums == {"a?": 6, "": 6}


def test_records_outside_the_window_do_not_count(store):
    work(store, Counters(requests=3))
    found = gather([store.layout.root], [], 0, NOW + 1e6)
    inside = list(textfile(found, PointsConfig(), str, NOW + 60, NOW + 61))
    outside = list(textfile(found, PointsConfig(), str, NOW + 61, NOW + 1e6))
    assert any(line.startswith("hpckv_requests_total{") for line in inside)
    assert not any(line.startswith("hpckv_requests_total{") for line in outside)


def test_oddities_are_counted(store):
    work(store, Counters(requests=1))
    (path,) = store.layout.ledger(os.getuid()).glob("*/*.jsonl")
    with path.open("ab") as file:
        file.write(b"torn")
    assert samples(lines(store))["hpckv_ledger_oddities", frozenset()] == 1


def test_the_file_is_whole_and_everybody_s_to_read(tmp_path):
    path = tmp_path / "hpckv.prom"
    path.write_text("old")
    with path.open() as reader:
        write_textfile(path, ["a 1", "b 2"])
        assert reader.read() == "old"  # whoever is reading goes on with the old one
    assert path.read_text() == "a 1\nb 2\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert os.listdir(tmp_path) == ["hpckv.prom"]


def test_a_file_that_nobody_reads_or_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"names end in \.prom"):
        write_textfile(tmp_path / "hpckv.txt", ["a 1"])
    with pytest.raises(CannotWriteError, match="No such file"):
        write_textfile(Path(tmp_path / "nowhere" / "hpckv.prom"), ["a 1"])
