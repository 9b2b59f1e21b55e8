//! What only some kernels have: `make kernels` runs these in a virtual machine.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{TcpTlsTx, TcpUlp, TlsCryptoInfo};
use nix::unistd::Pid;
use soccr_testkit::sockets::{state, tcp_sockets};
use soccr_testkit::stage::{V4, V6};
use soccr_testkit::task::{self, wait_until};
use soccr_testkit::{Client, Fleet, NetNs, Place, Server, Task};

use crate::world::{BUSY, PATIENCE, PLUGIN, stage};

/// Its keys and record numbers are in the kernel, which gives them to nobody.
#[test]
#[ignore = "needs a kernel with TLS: make kernels"]
fn kernel_tls_is_refused_by_name() -> Result<()> {
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let listener = stage.host().run(|| TcpListener::bind((V4, 0)))?;
    let address = listener.local_addr()?;
    let mut client = stage.peer.run(|| TcpStream::connect(address))?;
    client.set_read_timeout(Some(PATIENCE))?;
    let (mut connection, _) = listener.accept()?;
    setsockopt(&connection, TcpUlp::default(), b"tls").context("TCP_ULP tls")?;
    let key = TlsCryptoInfo::Aes128Gcm(libc::tls12_crypto_info_aes_gcm_128 {
        info: libc::tls_crypto_info {
            version: libc::TLS_1_2_VERSION,
            cipher_type: libc::TLS_CIPHER_AES_GCM_128,
        },
        iv: [1; 8],
        key: [2; 16],
        salt: [3; 4],
        rec_seq: [0; 8],
    });
    setsockopt(&connection, TcpTlsTx, &key).context("TLS_TX")?;

    let mut command = stage.host().command("sleep");
    command.arg("600").stdin(OwnedFd::from(connection.try_clone()?));
    command.stdout(Stdio::null()).stderr(Stdio::null());
    task::in_own_session(&mut command);
    let owner = Task::adopt(Pid::from_raw(i32::try_from(command.spawn()?.id())?));

    let images = stage.images()?;
    let refused = stage.dump(PLUGIN, owner.pid(), &images).run();
    let said = refused.map_or_else(|error| format!("{error:#}"), |_| String::new());
    let tuple = format!("{address} → {}", client.local_addr()?);
    ensure!(said.contains(&tuple) && said.contains("TLS"), "{tuple} is not refused: {said}");

    ensure!(owner.is_alive()?, "the task is gone");
    stage.wait_until_clean(None)?;
    connection.write_all(b"x")?;
    client.read_exact(&mut [0; RECORD])?;
    Ok(())
}

/// One byte in a record of TLS 1.2 with AES-GCM: header, nonce, the byte, tag.
const RECORD: usize = 5 + 8 + 1 + 16;

/// Puts the server's end of the wire into a VRF. A listener outside of it takes connections from inside, which are then
/// bound to it.
pub fn enter_vrf(host: &NetNs) -> Result<()> {
    host.ip("link add red type vrf table 10")?;
    host.ip("link set red up")?;
    host.ip("link set eth0 master red")?;
    let accept = "net.ipv4.tcp_l3mdev_accept=1";
    ensure!(host.command("sysctl").args(["-qw", accept]).status()?.success(), "sysctl refuses {accept}");
    // IPv6 addresses may go when the device changes its master.
    host.ip(&format!("addr replace {V6}/64 dev eth0 nodad"))
}

fn busy_in_vrf(listen: &str, reach: &str) -> Result<()> {
    const CLIENTS: usize = 10;
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    enter_vrf(stage.host())?;
    let server = stage.serve(listen, &["--mode", "echo"])?;
    let mut reach: SocketAddr = reach.parse()?;
    reach.set_port(server.address.port());
    let clients: Vec<_> = (0..CLIENTS).map(|_| stage.connect(reach)).collect::<Result<_>>()?;
    let busy = Fleet::echoes(clients, BUSY)?;
    let _server = stage.freeze_and_thaw(server, PLUGIN, PLUGIN)?;
    let clients = busy.stop(PATIENCE).whole()?;
    ensure!(clients.iter().all(|client| client.received() > 0), "a client never got anything");
    Ok(())
}

#[test]
#[ignore = "needs a kernel with VRF: make kernels"]
fn busy_peers_in_a_vrf_over_ipv4() -> Result<()> {
    busy_in_vrf("0.0.0.0:0", &format!("{V4}:0"))
}

#[test]
#[ignore = "needs a kernel with VRF: make kernels"]
fn busy_peers_in_a_vrf_over_ipv6() -> Result<()> {
    busy_in_vrf("[::]:0", &format!("[{V6}]:0"))
}

/// Its FIN is forged on the loopback device, which is not in the VRF.
#[test]
#[ignore = "needs a kernel with VRF: make kernels"]
fn close_wait_in_a_vrf() -> Result<()> {
    const SENT: u64 = 1_000_000;
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    enter_vrf(stage.host())?;
    let args = ["--mode", "stream", "--conns", "1", "--send", "1000000", "--sndbuf", "20000"];
    let server = stage.serve("0.0.0.0:0", &args)?;
    let mut reach: SocketAddr = format!("{V4}:0").parse()?;
    reach.set_port(server.address.port());
    let mut client = stage.peer.run(|| Client::connect_small(reach, 20_000))?;
    client.finish()?;
    let is_closing = |server: &Server| -> Result<bool> {
        let sockets = tcp_sockets(server.pid())?;
        Ok(sockets.iter().any(|socket| socket.state().is_ok_and(|it| it == state::CLOSE_WAIT)))
    };
    wait_until("the server is half closed", PATIENCE, || is_closing(&server))?;
    let server = stage.freeze_and_thaw(server, PLUGIN, PLUGIN)?;
    ensure!(is_closing(&server)?, "the state is another one now");
    client.receive_to_end(SENT)?;
    server.release()?;
    server.wait_verified()
}
