"""The simplest order of samples, for tests of code that reads in an order."""

from kfood_dist.data.plan.sampling import Order, build_order


def plain_order(num_samples: int, window: int | None = None, index_hash: str = "") -> Order:
    """Return an order with each of `num_samples` samples once per epoch."""
    return build_order([num_samples], [1.0], window=window, index_hash=index_hash)
