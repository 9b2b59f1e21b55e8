//! Images cross over: what one side dumps the other restores.

use anyhow::Result;
use soccr_testkit::sockets::{TaskSocket, tcp_sockets};
use soccr_testkit::task::wait_until;
use soccr_testkit::{Client, Place, Server, Side};

use crate::world::{PATIENCE, PLUGIN, PLUGIN_IPTABLES, SERVER_V4, STOCK, STOCK_IPTABLES, stage};

/// More than either end's buffers take, so that both windows close and both send queues stay full.
const MORE_THAN_FITS: u64 = 2 << 20;

fn full_queues_cross(place: Place, dump: Side, restore: Side) -> Result<()> {
    let Some(mut stage) = stage(place, &[dump, restore])? else { return Ok(()) };
    let send = MORE_THAN_FITS.to_string();
    let args = ["--mode", "stream", "--conns", "1", "--hold", "--send", &send, "--rcvbuf", "20000"];
    let server = stage.serve(SERVER_V4, &args)?;
    let mut client = stage.peer.run(|| Client::connect_small(server.address, 20_000))?;
    client.fill()?;
    wait_until_stuck(&server, &client)?;

    let server = stage.freeze_and_thaw(server, dump, restore)?;
    server.release()?;
    client.finish()?;
    client.receive_to_end(MORE_THAN_FITS)?;
    server.wait_verified()
}

/// Waits until both ends have data in both queues and neither moves.
fn wait_until_stuck(server: &Server, client: &Client) -> Result<()> {
    wait_until("both queues are full", PATIENCE, || {
        let mut ends = tcp_sockets(server.pid())?;
        ends.retain(|socket| socket.peer().is_some());
        ends.push(TaskSocket::of(client)?);
        ends.iter().try_fold(ends.len() == 2, |stuck, end| Ok(stuck && end.is_stuck()?))
    })
}

macro_rules! crossings {
    ($($place:ident { $($name:ident: $dump:ident => $restore:ident,)* })*) => {$(
        #[allow(non_snake_case)]
        mod $place {
            use super::*;
            $(#[test]
            fn $name() -> Result<()> {
                full_queues_cross(Place::$place, $dump, $restore)
            })*
        }
    )*};
}

crossings! {
    Host {
        stock_to_stock: STOCK => STOCK,
        stock_to_plugin: STOCK => PLUGIN,
        stock_iptables_to_plugin: STOCK_IPTABLES => PLUGIN,
        plugin_to_stock: PLUGIN => STOCK,
        plugin_to_plugin: PLUGIN => PLUGIN,
        plugin_iptables_to_plugin_iptables: PLUGIN_IPTABLES => PLUGIN_IPTABLES,
    }
    External {
        stock_to_stock: STOCK => STOCK,
        stock_to_plugin: STOCK => PLUGIN,
        stock_iptables_to_plugin: STOCK_IPTABLES => PLUGIN,
        plugin_to_stock: PLUGIN => STOCK,
        plugin_to_plugin: PLUGIN => PLUGIN,
    }
    Dumped {
        stock_to_stock: STOCK => STOCK,
        stock_to_plugin: STOCK => PLUGIN,
        stock_iptables_to_plugin: STOCK_IPTABLES => PLUGIN,
        plugin_to_stock: PLUGIN => STOCK,
        plugin_to_plugin: PLUGIN => PLUGIN,
    }
}
