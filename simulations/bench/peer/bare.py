"""The same training steps without any federation: what the steps themselves cost."""

from __future__ import annotations

import json
import sys
import time

from simulations.bench.peer.task import load_data, load_model, train

__all__ = ["main"]


def main(steps: int) -> None:
    """Load once, tokenise once, take ``steps`` steps; print the seconds of the steps as JSON."""
    model = load_model()
    dataset = load_data(0, 1)
    started = time.perf_counter()
    train(model, dataset, steps, 1e-3)
    print(json.dumps({"steps_s": time.perf_counter() - started}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
