#!/usr/bin/python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""bench.py CRIUS OURS: runs two builds of bench.c in turns, for queues of four lengths, and prints their medians."""

import statistics
import subprocess
import sys

TURNS = 7
# (bytes in each queue, connections in a turn)
LENGTHS = ((0, 3000), (1 << 10, 3000), (64 << 10, 1000), (4 << 20, 40))
WHAT = ("pause + save", "restore + resume")


def turn(program, queued, rounds):
    output = subprocess.run([program, str(queued), str(rounds)], check=True, stdout=subprocess.PIPE, text=True).stdout
    return [int(ns) for ns in output.split()]


def main():
    crius, ours = sys.argv[1:3]
    print(f"{'each queue':>12}  {'':16} {'CRIU us':>9} {'ours us':>9} {'ratio':>6}")
    for queued, rounds in LENGTHS:
        turns = [(turn(crius, queued, rounds), turn(ours, queued, rounds)) for _ in range(TURNS)]
        for index, what in enumerate(WHAT):
            theirs = statistics.median(c[index] for c, _ in turns)
            mine = statistics.median(o[index] for _, o in turns)
            ratio = statistics.median(o[index] / c[index] for c, o in turns)
            print(f"{queued:>10} B  {what:16} {theirs / 1000:9.2f} {mine / 1000:9.2f} {ratio:6.2f}")


if __name__ == "__main__":
    main()
