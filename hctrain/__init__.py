"""Train PyTorch models under stochastic constraints, with algorithms you can read beside their equations"""

__version__ = "0.0.1"

from .constraints import (
    AllOf,
    MeanGap,
    Proxy,
    RateGap,
    Rates,
    Sharpened,
    WeightedBCE,
    accuracy,
    fairret_rate,
    false_positive_rate,
    loss_rate,
    positive_rate,
    smoothed_step,
    true_positive_rate,
)
from .distributed import MicroBatches, Team, WholeStep, load_sharded, save_sharded
from .ghost import StochasticGhost
from .lagrangian import PI, Lagrangian
from .optimizer import ConstrainedOptimizer, SkipNonFinite, check_optimizer
from .penalty import Penalty, PenaltyBarrier, SmoothedPenalty
from .problem import KKT, Toy, kkt_residual, least_squares_multipliers, noisy_toy, toys
from .projection import Ball, Box, Simplex, project_after
from .replay import Replay, record
from .sampling import BalancedSampler, Batch, LoaderStreams, RandomStreams, Streams, check_sampler
from .sslalm import SSLALM
from .switching import SwitchingSubgradient
