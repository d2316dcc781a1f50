"""The passes over memory that the optimizers of cpr.py are made of. A pass knows tensors and numbers, no optimizer."""
