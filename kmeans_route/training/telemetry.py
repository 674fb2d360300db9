"""What a logger gets of many routers: the scalars of each, and their percentiles over all, within a number of keys."""

from collections.abc import Collection, Mapping

import torch

MAX_KEYS = 256
"""What the callbacks of frameworks give a logger at the most, unless told otherwise."""
PERCENTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "max": 1.0}
OF_FEW = ("min", "p50", "max")
"""Of so few routers that all percentiles were more figures than they have."""


def over_routers(
    per_router: Mapping[str, Mapping[str, float]], names: Collection[str] | None, max_keys: int | None
) -> dict[str, float]:
    """Flat scalars `<router>/<metric>`, and of several routers `routers/<metric>_<percentile>`.

    per_router: router name -> metric -> value. names: the metrics wanted; None for all. max_keys: above that many keys
    the single routers are left out, and of the percentiles those of the last metrics; None for no limit.
    """
    wanted = {
        router: {name: value for name, value in values.items() if names is None or name in names}
        for router, values in per_router.items()
    }
    alone = {f"{router}/{name}": value for router, values in wanted.items() for name, value in values.items()}
    by_name: dict[str, list[float]] = {}
    for values in wanted.values():
        for name, value in values.items():
            by_name.setdefault(name, []).append(value)
    shares = {name: PERCENTILES[name] for name in OF_FEW} if len(wanted) <= len(PERCENTILES) else PERCENTILES
    over = {
        f"routers/{name}_{percentile}": float(
            torch.tensor(values, dtype=torch.float64, device="cpu").nanquantile(share)
        )
        for name, values in by_name.items()
        for percentile, share in shares.items()
        if len(wanted) > 1
    }
    if max_keys is None or len(alone) + len(over) <= max_keys:
        return over | alone
    kept = over if len(wanted) > 1 else alone
    return dict(list(kept.items())[:max_keys])
