"""Accounting: the ledger that runs write (`docs/ledger-format.md`), and what is asked of it (`hpckv acct`)."""
