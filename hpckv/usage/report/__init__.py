"""The accounting as a page: `sections` asks the ledger, `draw` and `svg` draw with matplotlib, `page` writes HTML."""
