"""Side by side in one process: calls alternate, so that a drift in speed meets all; medians are reported."""
import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch


def alternate(calls, seconds=4., least=5, clock=time.perf_counter):
    """Median seconds of each call, in turn there and back until the time is spent and each ran `least` times.

    `clock=time.process_time` counts what the processor does, whatever else runs beside.
    """
    times, order = {k: [] for k in calls}, list(calls)
    for f in calls.values(): f()                                # warm-up
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < least:
        order = list(reversed(order))
        for k in order:
            start = clock()
            calls[k]()
            times[k].append(clock() - start)
    return {k: statistics.median(v) for k, v in times.items()}


def options(what, only='', **more):
    "Reads the command line; `more`: further options, name=(default, help)."
    p = argparse.ArgumentParser(description=what)
    p.add_argument('--threads', type=int, default=os.cpu_count())
    p.add_argument('--seconds', type=float, default=4., help='per row of the table')
    p.add_argument('--quick', action='store_true', help='small sizes only, to see that it works')
    p.add_argument('--json', type=Path, help='also write the rows here')
    if only: p.add_argument('--only', default=only, help='parts to measure')
    for k, (default, said) in more.items(): p.add_argument(f'--{k}', type=type(default), default=default, help=said)
    o = p.parse_args()
    torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    return o


def table(rows, o, title):
    "Prints rows (dicts with the same keys) and writes them as JSON if asked."
    keys = list(rows[0])
    text = [keys] + [[f'{v:.3g}' if isinstance(v, float) else str(v) for v in r.values()] for r in rows]
    widths = [max(map(len, col)) for col in zip(*text)]
    print(f'\n{title} ({o.threads} threads, torch {torch.__version__})')
    for row in text: print('  '.join(c.rjust(w) for c, w in zip(row, widths)))
    if o.json:
        before = json.loads(o.json.read_text()) if o.json.exists() else {}
        o.json.write_text(json.dumps(before | {title: rows}, indent=1))
