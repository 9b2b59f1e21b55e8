//! The soccr command: what is frozen on this host, what an image holds, what the kernel can do.

#![deny(unsafe_code)]

mod archive;
mod check;
mod clean;
mod config;
mod diff;
mod enable;
mod failure;
mod generate;
mod handover;
mod hold;
mod host;
mod images;
mod list;
mod options;
mod plugins;
mod progress;
mod restore;
mod runtime;
mod save;
mod scope;
mod show;
mod sockets;
mod status;
mod table;

use std::io::Write;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use failure::Capability;

/// Looks after TCP connections that soccr has frozen, dumped or restored on this host.
///
/// The plugin soccr_plugin.so lets stock CRIU dump and restore live TCP connections. While it works it changes things on
/// the host: it locks connections in the firewall and puts their sockets into repair mode. Before it changes anything it
/// writes a record of that into /run/soccr, and removes the record when all is undone. soccr shows these records and ends
/// what was left behind by a crash; it has runtimes load the plugin; and it says what is in the way.
#[derive(Debug, Parser)]
#[command(name = "soccr", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List the dumps and restores that have changed something on this host, and what has become of them.
    ///
    /// One in a line: the id, the state, the age, how many connections there are, the network namespaces in which they
    /// are locked, the folder of the images, and the processes. Where the dumped tasks have a network namespace of their own,
    /// CRIU itself locks all of it, which is shown as (whole). Nothing is printed when there are no records.
    ///
    /// The states: frozen (a dump is at work), left stopped (the dump is complete, its tasks were left stopped, and their
    /// connections stay locked until the tasks are continued or killed), dumped (the dump is complete, or a restore of it
    /// failed or was killed: the lock waits for `criu restore`), restoring (a restore is at work), orphaned (whoever worked
    /// on it was killed, or the host was started anew since: `soccr clean --orphans` ends it), elsewhere (it was recorded in
    /// another PID namespace, and from here nobody can tell whether somebody works on it).
    ///
    /// A record whose lock is gone, since stock CRIU has restored the dump, is removed when it is looked at. Locks and rules
    /// that no record tells of, such as those that stock CRIU leaves behind when it is killed, are listed as not ours, with the
    /// command that removes them: those in every network namespace that can be found by a process, a mount or an open file.
    Status(status::Arguments),
    /// End dumps and restores: remove their locks, bring back connections left in repair mode.
    ///
    /// Removes their locks and the rules for forged segments, brings connections that running tasks have in repair mode back
    /// to life, removes the record, and prints what it removed. What somebody is working on is left alone. When their criu is
    /// dead, its lock of the whole network namespace is removed too, where the record or one of its tasks leads to that
    /// namespace and no other dump there needs it.
    ///
    /// Of stock CRIU (--stock-rules) it removes the iptables rules for single connections, and the locks of whole namespaces
    /// (the iptables chain CRIU with the jumps to it, or a table "inet CRIU-RUN" of nf_tables), if they hold what CRIU puts
    /// there and nothing else. A lock that a record tells of goes with that record only, and one whose tasks are being traced
    /// is left alone.
    Clean(clean::Arguments),
    /// Lock connections that are about to come to this host, before their address or their network does.
    ///
    /// A restore of images from another host, or of an exported container, comes after the network is up: packets of the
    /// peers would meet no socket, and be answered with a reset. Reads the images (a folder, or an archive as podman, CRI-O
    /// and containerd write them) and locks their connections where the packets will pass, and nothing else. The restore
    /// takes the hold over and ends it; `soccr release` does so too.
    Hold(hold::HoldArguments),
    /// Give up what a hold, or a dump whose restore is not to come, keeps locked on this host.
    ///
    /// After a move to another host, the source keeps the connections locked, in case the restore is to be there. What is
    /// released meets no socket: peers that still send here are reset.
    Release(hold::ReleaseArguments),
    /// Take connections out of a running task, for `soccr restore` to give them to another program: without CRIU.
    ///
    /// Stops the task (SIGSTOP; whoever else has the sockets, too), locks the connections, writes each into a file
    /// soccr-ext-N.img, where N is its descriptor in hexadecimal, and continues the task. It finds the end of the stream in
    /// these sockets, and the peers hear nothing: the lock stays until the restore, as `soccr status` shows, and `soccr release`
    /// gives the connections up. All are saved or none: what cannot be carried is named.
    ///
    /// When this command is killed, the task stays stopped until `soccr clean` lets it and its connections go on, or, if the
    /// files were whole by then, `soccr restore` goes on. The files hold what program and peers have told each other.
    Save(save::Arguments),
    /// Give the connections of `soccr save` to a program.
    ///
    /// COMMAND takes the place of this one, and finds the sockets as descriptors 3, 4 and so on, in the order of the descriptors that
    /// they had, with LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES as sd_listen_fds(3) reads them; their names are fdN, N as it
    /// was. Or they are sent to a program that listens at a unix socket, 253 in a message at most, with a line "fdN LOCAL
    /// REMOTE" for each. The addresses must be on this host. The files are removed when the connections go on; when that fails,
    /// or the program cannot be started, they are there for another try.
    Restore(restore::Arguments),
    /// Show the connections in a folder or an archive of CRIU's images, or in files of `soccr save`.
    ///
    /// Both ends, the state, the bytes in the queues (how many, not which), the largest segment, and the processes and
    /// descriptors that they belong to. Archives are those that podman, CRI-O and containerd write.
    Show(show::Arguments),
    /// Tell what differs between the connections of two dumps, saves, archives or files.
    ///
    /// Connections that are in one of them only, and of those in both what has changed: the state, the queues' lengths, sequences,
    /// windows, what the ends agreed on, and socket options. Of CRIU's images only some options are looked at; one that one side does not
    /// tell of is shown as such. The exit status is 0 when they are the same, and 1 when they differ.
    Diff(diff::Arguments),
    /// List the TCP sockets of running tasks: states, queues, options, descriptors.
    ///
    /// Listening sockets are among them; what they have to read is how many connections wait to be accepted. Nothing is
    /// frozen or changed. Sockets in flight inside unix sockets (SCM_RIGHTS) are counted on the error output: to look at
    /// them would disturb who reads there.
    List(list::Arguments),
    /// Check what this kernel offers, which criu each runtime starts, and what of a task cannot be carried.
    ///
    /// Tries what the kernel offers, in a network namespace of its own, and says what each feature is needed for.
    ///
    /// For each of runc, crun, podman, containerd, LXC and criu on PATH: which criu it starts, whether that one can work on
    /// this kernel, whether it will load the plugin, and what to do about it. A configuration that is wrong, or in a file
    /// that nobody reads, says nothing of itself. Services may have another PATH than this command.
    ///
    /// With --pid: what of a running tree of tasks cannot be carried, before anything is frozen.
    Check(check::Arguments),
    /// Have the criu that a runtime starts load the plugin: adds lines to its configuration file.
    ///
    /// runc reads /etc/criu/runc.conf. crun reads /etc/criu/crun.conf (or runc.conf where that is missing) since 1.26, with
    /// libcriu 4.2 or later; an older one is refused. podman: that of the runtime that it is set up to use. The lines
    /// tcp-close and libdir are added between two comments; what others have written there stays as it is, and what is
    /// against it is named. Containers that are started with the annotation org.criu.config read another file.
    Enable(enable::EnableArguments),
    /// Take back what `soccr enable` did.
    ///
    /// Its lines go; a file or a folder that it made goes too, unless something else is in it by now.
    Disable(enable::DisableArguments),
    /// Write the manual pages and the completions of shells.
    #[command(hide = true)]
    Generate(generate::Arguments),
}

fn main() -> ExitCode {
    let command = Arguments::parse().command;
    match run(&command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        // Who reads our output has seen enough.
        Err(error) if failure::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            warn_of(&error, capability(&command));
            ExitCode::FAILURE
        }
    }
}

fn run(command: &Command) -> anyhow::Result<bool> {
    match command {
        Command::Status(arguments) => status::run(arguments),
        Command::Clean(arguments) => clean::run(arguments),
        Command::Hold(arguments) => hold::hold(arguments),
        Command::Release(arguments) => hold::release(arguments),
        Command::Save(arguments) => save::run(arguments),
        Command::Restore(arguments) => restore::run(arguments),
        Command::Show(arguments) => show::run(arguments),
        Command::Diff(arguments) => diff::run(arguments),
        Command::List(arguments) => list::run(arguments),
        Command::Check(arguments) => check::run(arguments),
        Command::Enable(arguments) => enable::enable(arguments),
        Command::Disable(arguments) => enable::disable(arguments),
        Command::Generate(arguments) => generate::run(arguments, &Arguments::command()),
    }
}

/// What the command needs beyond an ordinary user's rights.
fn capability(command: &Command) -> Capability {
    match command {
        Command::Status(_)
        | Command::Clean(_)
        | Command::Hold(_)
        | Command::Release(_)
        | Command::Restore(_) => Capability::NetAdmin,
        Command::Save(_) | Command::List(_) | Command::Check(_) => Capability::SysPtrace,
        Command::Show(_)
        | Command::Diff(_)
        | Command::Enable(_)
        | Command::Disable(_)
        | Command::Generate(_) => Capability::DacOverride,
    }
}

/// Says something beside the output.
fn warn(text: &str) {
    // When stderr is closed there is nobody to tell.
    let _ = writeln!(Plain(std::io::stderr()), "soccr: {text}");
}

/// Says what failed, and for want of which capability, if that is why.
fn warn_of(error: &anyhow::Error, needed: Capability) {
    let missing = failure::missing_capability(error, needed);
    let missing = missing.map(|name| format!("; {name} is missing: run it as root")).unwrap_or_default();
    warn(&format!("{error:#}{missing}"));
}

/// Where the output goes.
fn out() -> impl Write {
    Plain(std::io::stdout().lock())
}

/// Shows control characters instead of sending them to a terminal: names out of images and of folders are anybody's.
struct Plain<W>(W);

impl<W: Write> Write for Plain<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut text = String::new();
        for c in String::from_utf8_lossy(bytes).chars() {
            match c {
                '\n' => text.push(c),
                c if c.is_control() => text.extend(c.escape_default()),
                c => text.push(c),
            }
        }
        self.0.write_all(text.as_bytes()).map(|()| bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

/// Prints a value as JSON.
fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value)?;
    writeln!(out)?;
    Ok(())
}
