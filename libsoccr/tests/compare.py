#!/usr/bin/python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""compare.py CRIUS OURS: compares two outputs of compare.c, field by field.

A difference is explained when ours is what was given and CRIU's is not, or when it is one of those that
explain() names. Ends with 1 if one is left unexplained, or if a restore of ours failed.
"""

import collections
import sys

# The clock goes on between a restore and a read; in milliseconds, or microseconds.
CLOCK_MAY_GO = 1 << 22
TCPI_OPT_TIMESTAMPS = 1
TCPI_OPT_USEC_TS = 64
TCP_CLOSE = "7"
# The kernel reckons with timestamps whether they were agreed on or not, by net.ipv4.tcp_timestamps.
TIMESTAMPS_ROOM = 12
WINDOW = {"snd_wl1", "snd_wnd", "max_window", "rcv_wnd", "rcv_wup"}
# What the phases restored, field by field.
ORIGIN = {"built": "given", "saved": "given", "rebuilt": "saved", "resaved": "saved"}


def read(path):
    """{(number, phase, field): value}, in the file's order."""
    fields = {}
    with open(path, encoding="ascii") as lines:
        for line in lines:
            number, phase, field, value = line.split()
            fields[int(number), phase, field] = value
    return fields


def origin_of(fields, key, field):
    """What the phase of `key` restored as `field`."""
    number, phase, _field = key
    return fields.get((number, ORIGIN.get(phase), field))


def origin(fields, key):
    return origin_of(fields, key, key[2])


def faithful(fields, key):
    """Whether the value is still the one that was given at first."""
    before = origin(fields, key)
    if before is None or fields.get(key) != before:
        return False
    number, phase, field = key
    return ORIGIN[phase] == "given" or faithful(fields, (number, ORIGIN[phase], field))


def clock_goes_on(fields, key):
    gone = int(fields[key]) - int(origin(fields, key) or 0)
    return gone % (1 << 32) < CLOCK_MAY_GO or (gone + 1) % (1 << 32) < CLOCK_MAY_GO


def timestamps_off(fields, key):
    return not int(origin_of(fields, key, "opt_mask")) & TCPI_OPT_TIMESTAMPS


def same(crius, ours, key):
    if crius.get(key) == ours.get(key):
        return True
    if key[2] != "timestamp" or key not in crius or key not in ours:
        return False
    return timestamps_off(ours, key) or clock_goes_on(crius, key) and clock_goes_on(ours, key)


def segment_size(fields, key):
    """The kernel's tcp_sync_mss(): mss_clamp less the timestamps' room, at most half of the peer's window."""
    clamp = int(origin_of(fields, key, "mss_clamp"))
    window = int(fields[key[0], key[1], "max_window"])
    size = clamp - TIMESTAMPS_ROOM
    bound = window // 2 if window > 536 else window
    return max(bound, 48 - TIMESTAMPS_ROOM) if 0 < bound < size else size


def explain(crius, ours, key):
    number, phase, field = key
    if faithful(ours, key) and not faithful(crius, key):
        return "ours is what was given, CRIU's is not"
    if key not in ours or key not in crius:
        return None
    mine, theirs = int(ours[key]), int(crius[key])
    if field == "tcpi_snd_mss" and mine == segment_size(ours, key):
        return "ours is computed from mss_clamp, CRIU's while that is still the default"
    if field == "tcpi_snd_mss" and ours[number, phase, "state"] == TCP_CLOSE:
        return "a closed connection sends no segments"
    if field == "opt_mask" and theirs == mine | TCPI_OPT_USEC_TS:
        return "CRIU's turns on microseconds for a timestamp that happens to be odd"
    if field in WINDOW and not int(ours[number, "given", "flags"]):
        return "no windows were given, so they are the kernel's choice"
    if field == "SIOCOUTQNSD" and (mine, theirs) == (0, 1) and not int(origin_of(ours, key, "unsq_len")):
        return "ours takes the FIN for sent where all bytes were, CRIU's after an empty send queue does not"
    return None


def main():
    crius, ours = (read(path) for path in sys.argv[1:3])
    keys = list(dict.fromkeys([*crius, *ours]))
    explained, unexplained = collections.Counter(), []
    for key in keys:
        if same(crius, ours, key):
            continue
        why = explain(crius, ours, key)
        if why:
            explained[why, key[2]] += 1
        else:
            unexplained.append(key)
    unexplained += [key for key in keys if ours.get(key) == "failed"]
    connections = len({number for number, _, _ in keys})
    print(f"compared: {connections} connections, {len(keys)} fields and queues")
    print(f"differences: {len(unexplained)} unexplained, {sum(explained.values())} explained")
    for (why, field), count in sorted(explained.items()):
        print(f"  {count:5} {field}: {why}")
    for key in unexplained[:40]:
        number, phase, field = key
        state = ours[number, "given", "state"]
        print(f"  connection {number} (state {state}), {phase} {field}: "
              f"CRIU's {crius.get(key)}, ours {ours.get(key)}, given {origin(ours, key)}")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
