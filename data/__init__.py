"""Token data. tokens.py reads it, writer.py writes it; each folder here is a data set."""
