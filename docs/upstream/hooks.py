#!/usr/bin/python3
"""What a plugin is not asked, and what it is not told: why `--tcp-close` has to stand in.

A plugin that logs its hooks (and calls the restore's last one failed) is loaded into a dump and a restore of a process with one
connection and one descriptor of a kind that CRIU does not know.
"""

import os
import pathlib
import subprocess

import stage

PLUGIN = r"""
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include "criu-plugin.h"

static void say(const char *hook, long a, long b)
{
	FILE *log = fopen("LOG", "a");
	fprintf(log, "%s %ld %ld\n", hook, a, b);
	fclose(log);
}
static int start(int stage) { say("init", stage, 0); return 0; }
static void end(int stage, int ret) { say("exit", stage, ret); }
static int checkpoint(int pid) { say("CHECKPOINT_DEVICES", pid, 0); return 0; }
static int dump_file(int fd, int id)
{
	struct stat file;
	fstat(fd, &file);
	say("DUMP_EXT_FILE", file.st_ino, id);
	return 0;
}
static int restore_file(int id) { say("RESTORE_EXT_FILE", id, 0); return open("/dev/null", O_RDWR); }
static int late(int pid) { say("RESUME_DEVICES_LATE", pid, -EIO); return -EIO; }

CR_PLUGIN_REGISTER("asked", start, end)
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__CHECKPOINT_DEVICES, checkpoint)
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__DUMP_EXT_FILE, dump_file)
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__RESTORE_EXT_FILE, restore_file)
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__RESUME_DEVICES_LATE, late)
"""

SERVER = """
import ctypes, os, signal, socket
listener = socket.create_server(("10.0.0.1", 7000))
# landlock_create_ruleset() has the same number everywhere.
rules = ctypes.create_string_buffer((1).to_bytes(8, "little"), 8)
print("ready", ctypes.CDLL(None).syscall(444, rules, 8, 0), flush=True)
stream = listener.accept()[0]
stream.recv(1)
stream.sendall(b"accepted")
signal.pause()
"""


def build(folder):
    header = pathlib.Path(stage.CRIU).parent / "include"
    source, log = folder / "asked.c", folder / "asked.log"
    source.write_text(PLUGIN.replace("LOG", str(log)))
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-iquote", header, "-o", folder / "asked.so", source], check=True)
    source.unlink()
    return log


def main():
    folder = pathlib.Path(stage.images())
    log = build(folder)
    server = stage.serve(SERVER)
    [client] = stage.connect()
    client.send(b"?")
    client.recv(8)
    pid, images = str(server.pid), stage.images()
    links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    print("the process has:", *links)

    def criu(title, action, *options):
        log.write_text("")
        status, said = stage.criu(action, images, "--lib", folder, "--tcp-established", *options)
        hooks = log.read_text().splitlines()
        print(f"{title}: ended with {status}; hooks:", ", ".join(hooks))
        if status:
            print(*stage.errors(said), sep="\n")
        return status, hooks

    dumped = "-t", pid
    running, first = criu("criu dump --leave-running", "dump", *dumped, "--leave-running")
    killed, second = criu("criu dump", "dump", *dumped)
    server.wait()
    restored, _ = criu("criu restore", "restore", "-d")
    asked = [hook for hook in second if hook.startswith("DUMP_EXT_FILE")]
    return (running, killed, restored) == (0, 0, 0) and len(asked) == 1 and first[-1] == second[-1]


stage.run(main)
