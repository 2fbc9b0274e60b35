"""The mathematics, one file an operation, with its plain-PyTorch definition beside it."""
