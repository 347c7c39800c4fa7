import os

os.environ.setdefault("MPLBACKEND", "agg")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run notebook cells marked `#| slow`")


def pytest_configure(config):
    import torch
    torch.set_num_threads(1)  # networks of a few thousand weights are slower on two threads
