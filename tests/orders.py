"""The plainest order of samples, for tests of what reads by one."""

from kfood_dist.data.plan.sampling import Order, build_order


def plain_order(num_samples: int, window: int | None = None, index_hash: str = "") -> Order:
    """Every one of `num_samples` samples once per epoch."""
    return build_order([num_samples], [1.0], window=window, index_hash=index_hash)
