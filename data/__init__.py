"""Token data: prepare.py writes it, tokens.py reads it, each folder here is a data set or can become one."""
