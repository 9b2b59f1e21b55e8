#!/usr/bin/python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""bench.py CRIUS OURS: what two builds of bench.c cost, for queues of four lengths.

The two take turns, short ones and many, and change who begins: what else the machine does meets both. Each turn tells
its medians. Printed are the medians of these, and as the ratio the median of the ratios of two that ran one after the
other, which stays within 2 % from run to run even on a busy machine.
"""

import statistics
import subprocess
import sys

# (bytes in each queue, turns, connections in a turn)
LENGTHS = ((0, 60, 1000), (1 << 10, 60, 1000), (64 << 10, 60, 400), (4 << 20, 40, 8))
WHAT = ("pause + save", "restore + resume")


def turn(program, queued, rounds):
    output = subprocess.run([program, str(queued), str(rounds)], check=True, stdout=subprocess.PIPE, text=True).stdout
    return [int(ns) for ns in output.split()]


def pair(crius, ours, queued, rounds, ours_first):
    if ours_first:
        mine = turn(ours, queued, rounds)
        return turn(crius, queued, rounds), mine
    return turn(crius, queued, rounds), turn(ours, queued, rounds)


def main():
    crius, ours = sys.argv[1:3]
    print(f"{'each queue':>12}  {'':16} {'CRIU us':>9} {'ours us':>9} {'ratio':>6}")
    for queued, count, rounds in LENGTHS:
        turns = [pair(crius, ours, queued, rounds, n % 2) for n in range(count)]
        for index, what in enumerate(WHAT):
            theirs = statistics.median(c[index] for c, _ in turns)
            mine = statistics.median(o[index] for _, o in turns)
            ratio = statistics.median(o[index] / c[index] for c, o in turns)
            print(f"{queued:>10} B  {what:16} {theirs / 1000:9.2f} {mine / 1000:9.2f} {ratio:6.2f}")


if __name__ == "__main__":
    main()
