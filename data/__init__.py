"""Token data: prepare.py writes it, tokens.py reads it, and each folder here is a data set."""
