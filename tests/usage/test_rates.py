"""How fast earlier runs were, by the ledger."""

import os
import time

from hpckv.store.policy import StorePolicy
from hpckv.store.root import StoreRoot
from hpckv.usage.ledger import LedgerFile
from hpckv.usage.rates import ledger_rates
from hpckv.usage.record import Counters, Record

NOW = float(int(time.time()))
WORK = Counters(
    requests=1, prompt_tokens=1000, computed_tokens=1000, output_tokens=600, prefill_s=2.0, decode_s=3.0, gpu_s=60.0
)


def start(store: StoreRoot, loading_s: float, gpu: str = "NVIDIA H100", model: str = "m", num_gpus: int = 1) -> None:
    """One that loaded its model for so long, and then worked for a minute twice."""
    pattern = Record.of_this_process(model=model, gpu=gpu, num_gpus=num_gpus)
    t0 = NOW - 3600
    file = LedgerFile(store.layout.ledger(os.getuid()), pattern, store.make_own_folder, now=t0)
    file.append(Counters(gpu_s=loading_s), now=t0 + loading_s)
    for minute in (1, 2):
        file.append(WORK, now=t0 + loading_s + minute * 60)
    file.close()


def test_a_start_takes_the_median_of_earlier_ones(tmp_path):
    store = StoreRoot.create(tmp_path / "store", StorePolicy.new())
    for loading_s in (8.0, 40.0, 12.0):
        start(store, loading_s)
    start(store, 90.0, num_gpus=4)
    start(store, 300.0, model="another")
    one, four = sorted(ledger_rates(store.layout.root, "m", NOW), key=lambda rates: rates.num_gpus)
    assert (one.gpu, one.num_gpus, one.start_s) == ("NVIDIA H100", 1, 12.0)
    assert (four.num_gpus, four.start_s) == (4, 90.0)
    assert (one.prefill_tokens_per_s, one.decode_tokens_per_s) == (500.0, 200.0)
