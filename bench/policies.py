"""Hit rates of every eviction policy on made workloads: what the two recorded traces cannot tell.

    python -m bench.policies --seed 11 --requests 4000 [WORKLOAD ...]

Prints % of blocks that hit at 1, 3, 10 and 30 % of the unique blocks, with Belady's optimum, and how far ours is from
the best of the others.
"""

from __future__ import annotations

import argparse

from kvstore.policies.belady import optimum
from kvstore.policies.choice import POLICIES
from kvstore.policies.replay import replay
from kvstore.policies.workloads import WORKLOADS

SHARES = (0.01, 0.03, 0.1, 0.3)
OURS = "gittins"


def main() -> None:
    names = [workload.name for workload in WORKLOADS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=", ".join(names))
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--requests", type=int, default=4000)
    options = parser.parse_args()
    for workload in WORKLOADS:
        if options.workloads and workload.name not in options.workloads:
            continue
        trace = workload.trace(options.seed, options.requests)
        capacities = [int(trace.unique_blocks * share) for share in SHARES]
        print(f"{workload.name}: {trace.blocks} blocks, {trace.unique_blocks} unique")
        rates = {
            name: [replay(trace, make(), capacity).hit_rate for capacity in capacities]
            for name, make in POLICIES.items()
        }
        rates["optimum"] = [optimum(trace, capacity).hit_rate for capacity in capacities]
        for name, row in rates.items():
            print(f"  {name:10}", *(f"{100 * rate:7.2f}" for rate in row), flush=True)
        others = [name for name in POLICIES if name != OURS]
        ahead = [ours - max(rates[name][at] for name in others) for at, ours in enumerate(rates[OURS])]
        print("  ahead by  ", *(f"{100 * by:+7.2f}" for by in ahead), flush=True)


if __name__ == "__main__":
    main()
