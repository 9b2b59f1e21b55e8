//! A connection of the soak: what it is to do is its client's [`Order`].

use std::net::TcpStream;

use anyhow::{Result, bail, ensure};
use nix::sys::socket::{setsockopt, sockopt};
use soccr_testkit::Pattern;

use super::order::{OPEN, Order, block};

/// Bytes that go over one connection before others have their turn.
pub const TURN: usize = 256 << 10;

pub struct Session {
    port: u16,
    head: Vec<u8>,
    order: Option<Order>,
    received: u64,
    blocks: u64,
    last_stamped: bool,
    /// In this tick, or turn for those that have no pace.
    pub may_read: usize,
    pub may_write: usize,
}

impl Session {
    /// `port` is the client's.
    pub fn new(port: u16) -> Self {
        Self {
            port,
            head: Vec::new(),
            order: None,
            received: 0,
            blocks: 0,
            last_stamped: false,
            may_read: TURN,
            may_write: 0,
        }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn is_paced(&self) -> bool {
        self.order.is_some_and(|order| order.read > 0 || order.write > 0)
    }

    /// A new tick, or a new turn.
    pub fn allow(&mut self) {
        let amount = |bytes| if bytes == 0 { TURN } else { usize::try_from(bytes).unwrap_or(TURN) };
        if let Some(order) = self.order {
            (self.may_read, self.may_write) = (amount(order.read), amount(order.write));
        }
    }

    pub fn take(&mut self, bytes: &[u8], socket: &TcpStream) -> Result<()> {
        let (head, bytes) = bytes.split_at(bytes.len().min(Order::LEN - self.head.len()));
        self.head.extend(head);
        if self.order.is_none()
            && let Some(head) = self.head.first_chunk()
        {
            let order = Order::decode(head);
            self.order = Some(order);
            self.allow();
            let buffers = usize::try_from(order.buffers)?;
            if buffers > 0 {
                setsockopt(socket, sockopt::SndBuf, &buffers)?;
                setsockopt(socket, sockopt::RcvBuf, &buffers)?;
            }
        }
        Pattern::to_server(self.port).check(self.received, bytes)?;
        self.received += bytes.len() as u64;
        Ok(())
    }

    /// The client's stream has ended.
    pub fn check_end(&self) -> Result<()> {
        let Some(order) = self.order else { bail!("ended before its order") };
        let whole = order.upload == OPEN || order.upload == self.received;
        ensure!(whole, "{} of {} bytes came before the end", self.received, order.upload);
        Ok(())
    }

    pub fn has_more(&self, eof: bool) -> bool {
        self.next_is_block(eof) || self.next_is_last_stamp(eof)
    }

    fn next_is_block(&self, eof: bool) -> bool {
        self.order.is_some_and(|order| self.blocks < order.blocks && !(order.blocks == OPEN && eof))
    }

    /// The last stamp of an open upload counts all of it, so its end must have come.
    fn next_is_last_stamp(&self, eof: bool) -> bool {
        let due = |order: Order| !self.next_is_block(eof) && (eof || order.upload != OPEN);
        !self.last_stamped && self.order.is_some_and(due)
    }

    pub fn more(&mut self, eof: bool) -> Vec<u8> {
        if self.next_is_block(eof) {
            self.blocks += 1;
            return block(Pattern::to_client(self.port), self.blocks - 1, self.received);
        }
        self.last_stamped = true;
        self.received.to_be_bytes().to_vec()
    }

    pub fn is_over(&self) -> bool {
        self.last_stamped
    }
}
