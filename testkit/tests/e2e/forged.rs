//! Images that were changed, on their way through a restore.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use soccr::connection::{ControlBlock, Queues, State};
use soccr::criu::image::ImageDir;
use soccr::criu::image::index::Index;
use soccr::criu::image::side::{Accepted, Place as Where, SideImage, TreeListener};
use soccr::criu::image::tcp_stream::TcpStreamImage;
use soccr::lock::Listener;
use soccr::repair::{Paused, Probe, four_tuple};
use soccr_testkit::skip::lacks;
use soccr_testkit::task::wait_until;
use soccr_testkit::{Client, Fleet, Lock, Place, Side, Stage};

use crate::world::{BUSY, PATIENCE, PLUGIN, SERVER_V4, stage};

const CLIENTS: usize = 5;

/// Somebody else on the host of the restore: a listener, and both ends of a connection.
struct Stranger {
    listener: TcpListener,
    near: TcpStream,
    peer: TcpStream,
}

impl Stranger {
    fn on(stage: &Stage) -> Result<Self> {
        let listener = stage.host().run(|| TcpListener::bind(SERVER_V4))?;
        let address = listener.local_addr()?;
        let peer = stage.peer.run(|| TcpStream::connect(address))?;
        let near = listener.accept()?.0;
        [&peer, &near].into_iter().try_for_each(|it| it.set_read_timeout(Some(PATIENCE)))?;
        Ok(Self { listener, near, peer })
    }

    fn state(&self) -> Result<ControlBlock> {
        let paused = Paused::pause(self.near.as_fd())?;
        let tcp = paused.save(&mut Queues::default())?;
        paused.resume(Probe::None)?;
        Ok(tcp)
    }

    /// Its connection goes on, byte for byte, and who connects to it is accepted.
    fn goes_on(&mut self, stage: &Stage) -> Result<()> {
        let mut heard = [0; 5];
        self.peer.write_all(b"there")?;
        self.near.read_exact(&mut heard)?;
        ensure!(heard == *b"there", "the stranger has read {heard:?}");
        self.near.write_all(b"again")?;
        self.peer.read_exact(&mut heard)?;
        ensure!(heard == *b"again", "the stranger's peer has read {heard:?}");
        let address = self.listener.local_addr()?;
        let newcomer = stage.peer.run(|| TcpStream::connect_timeout(&address, PATIENCE))?;
        ensure!(self.listener.accept()?.1 == newcomer.local_addr()?, "somebody else is accepted");
        Ok(())
    }
}

/// A segment that the stranger's peer could send next.
fn segment(tcp: &ControlBlock, (from, to): (u16, u16), flags: u8, bytes: &[u8]) -> Vec<u8> {
    let mut segment = [from.to_be_bytes(), to.to_be_bytes()].concat();
    segment.extend([tcp.rcv_nxt.to_be_bytes(), tcp.write_seq.to_be_bytes()].concat());
    segment.extend([5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(bytes);
    segment
}

fn change(images: &Path, change: impl FnOnce(&mut SideImage)) -> Result<()> {
    let dir = ImageDir::open(images)?;
    let mut side = SideImage::read(&dir)?.context("soccr.img")?;
    change(&mut side);
    Ok(side.write(&dir)?)
}

/// Who can write images knows a stranger's addresses, and even the sequences. Held segments go to restored sockets only; a
/// listener where somebody else listens stops nobody; an accepted connection that is somebody else's is refused by name, and
/// without it the images can still be restored.
#[test]
fn what_names_a_strangers_connection_does_not_reach_it() -> Result<()> {
    const RST_ACK: u8 = 0x14;
    const PSH_ACK: u8 = 0x18;
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let server = stage.serve(SERVER_V4, &["--mode", "echo"])?;
    let clients = stage.connect_all(&[server.address], CLIENTS, Client::connect)?;
    let busy = Fleet::echoes(clients, BUSY)?;
    let mut stranger = Stranger::on(&stage)?;
    let images = stage.images()?;
    let task = format!("/proc/{}", server.pid());
    let address = stage.freeze(server, PLUGIN, &images)?;

    let (tuple, tcp) = (four_tuple(stranger.near.as_fd())?, stranger.state()?);
    let ports = (tuple.remote.port(), tuple.local.port());
    change(&images, |side| {
        side.held.add_any(tuple, &segment(&tcp, ports, PSH_ACK, b"evil"));
        side.held.add_any(tuple, &segment(&tcp, ports, RST_ACK, b""));
        let listener = Listener { local: tuple.local, v6only: false };
        let places = [Where::Inside, Where::BesideCriu, Where::OnPath];
        side.listeners.extend(places.map(|place| TreeListener { listener, place }));
    })?;
    let dir = ImageDir::open(&images)?;
    let listener = Index::read(&dir)?.unconnected.first().context("the listener")?.ino;
    const INO: u32 = 0x7fff_0000;
    let forged = ControlBlock {
        state: State::CloseWait,
        recv_len: 4,
        rcv_nxt: tcp.rcv_nxt.wrapping_add(4 + 1),
        send_len: 0,
        unsent_len: 0,
        ..tcp
    };
    TcpStreamImage::write(&dir, INO, &forged, b"evil", b"")?;
    let state = State::CloseWait;
    change(&images, |side| side.accepted.push(Accepted { listener, ino: INO, tuple, state }))?;
    let failed = stage.restore(PLUGIN, &images)?.run();
    let error = format!("{:#}", failed.err().context("a stranger's connection was accepted")?);
    if error.contains("bpf_sk_assign_tcp_reqsk") {
        lacks("bpf_sk_assign_tcp_reqsk")?;
    } else {
        ensure!(error.contains(&tuple.to_string()), "{error}");
    }
    stranger.goes_on(&stage)?;

    change(&images, |side| side.accepted.clear())?;
    stage.wait_until_quiet()?;
    wait_until("the first try's task is gone", PATIENCE, || {
        stage.reap(None)?;
        Ok(!Path::new(&task).exists())
    })?;
    let server = stage.thaw(address, PLUGIN, &images)?;
    stranger.goes_on(&stage)?;
    busy.stop(PATIENCE).whole()?;
    drop(stranger);
    stage.wait_until_clean(Some(&server))
}

/// Images of CRIU before 4.2 do not name their dump. Of two such in one namespace each restore has a lock of its own, and
/// both run at once.
#[test]
fn two_restores_of_images_without_a_run_id_share_a_namespace() -> Result<()> {
    let stock = Side::Stock(Lock::Iptables);
    let Some(mut stage) = stage(Place::Host, &[PLUGIN, stock])? else { return Ok(()) };
    let mut dumped = Vec::new();
    for nth in 0..2 {
        let server = stage.serve(SERVER_V4, &["--mode", "echo"])?;
        let clients = stage.connect_all(&[server.address], CLIENTS, Client::connect)?;
        let busy = Fleet::echoes(clients, BUSY)?;
        let images = stage.dir().join(format!("nameless-{nth}"));
        std::fs::create_dir(&images)?;
        let pid = server.pid();
        let address = stage.freeze(server, stock, &images)?;
        forget_run_id(&images)?;
        dumped.push((images, address, pid, busy));
    }
    let calls: Vec<_> =
        dumped.iter().map(|(images, ..)| stage.restore(PLUGIN, images)?.spawn()).collect::<Result<_>>()?;
    for ((mut criu, log), (_, address, pid, busy)) in calls.into_iter().zip(dumped) {
        let status = criu.wait()?;
        ensure!(status.success(), "{status}: {}", soccr_testkit::criu::last_errors(&log));
        let server = soccr_testkit::Server::restored(address, soccr_testkit::Task::adopt(pid), stage.dir());
        busy.stop(PATIENCE).whole()?;
        stage.wait_until_quiet()?;
        drop(server);
    }
    stage.wait_until_clean(None)
}

/// Field 13 of the inventory becomes one that nobody knows.
fn forget_run_id(images: &Path) -> Result<()> {
    const KEY: [u8; 2] = [13 << 3 | 2, 36];
    const UNKNOWN: u8 = 15 << 3 | 2;
    let path = images.join("inventory.img");
    let mut inventory = std::fs::read(&path)?;
    let at = inventory.windows(2).position(|bytes| bytes == KEY).context("no run id of 36 letters")?;
    inventory[at] = UNKNOWN;
    Ok(std::fs::write(path, inventory)?)
}
