//! The connections that images tell of.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use soccr::connection::{ControlBlock, FourTuple, Queues};
use soccr::criu::image::external::ExternalImage;
use soccr::criu::image::index::{Index, InetConnection};
use soccr::criu::image::tcp_stream::TcpStreamImage;
use soccr::criu::image::{ImageDir, inventory};
use soccr::kernel::options::SocketOption;

use crate::{archive, options};

/// What a folder, an archive or a file tells.
#[derive(Debug)]
pub struct Images {
    /// `None`: a connection's file, or a folder of such without images of CRIU.
    pub dump: Option<Dump>,
    pub connections: Vec<Connection>,
}

#[derive(Debug, Serialize)]
pub struct Dump {
    pub dump_run_id: Option<String>,
    pub network_lock: String,
    pub tcp_close: bool,
}

#[derive(Debug)]
pub struct Connection {
    pub tuple: FourTuple,
    pub tcp: ControlBlock,
    /// The socket options that are in the image, by name.
    pub options: BTreeMap<String, String>,
    /// The socket's inode number at the dump.
    pub inode: Option<u32>,
    pub net_ns_id: Option<u32>,
    pub owners: Vec<Owner>,
}

/// A descriptor that leads to the connection.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Owner {
    /// The task, as it sees itself.
    pub pid: u32,
    pub fd: i32,
    /// The descriptor is a unix socket in which the connection is in flight.
    pub in_flight: bool,
}

impl Images {
    /// Reads a folder, an archive, or the file of one connection.
    pub fn read(path: &Path) -> Result<Self> {
        if path.is_file() && path.extension().is_some_and(|extension| extension == "img") {
            return Self::of_file(path).with_context(|| path.display().to_string());
        }
        let images = archive::Images::open(path)?;
        Self::of_folder(&images.dir).with_context(|| images.path.display().to_string())
    }

    fn of_file(path: &Path) -> Result<Self> {
        let connection = soccr::Connection::from_bytes(&fs::read(path)?)?;
        let (tuple, tcp) = (connection.four_tuple(), *connection.control_block());
        Ok(Self { dump: None, connections: vec![external(tuple, tcp, connection.options())] })
    }

    fn of_folder(dir: &ImageDir) -> Result<Self> {
        let mut connections = Vec::new();
        ExternalImage::for_each(dir, |image| {
            connections.push(external(image.tuple, image.tcp, &image.options));
        })?;
        let mut dump = None;
        if dir.contains(inventory::NAME) {
            let index = Index::read(dir)?;
            connections.extend(of_index(dir, &index)?);
            dump = Some(Dump {
                network_lock: format!("{:?}", index.network_lock).to_lowercase(),
                tcp_close: index.tcp_close,
                dump_run_id: index.dump_run_id,
            });
        } else if connections.is_empty() {
            bail!("there are no images of CRIU or soccr");
        }
        connections.sort_by_key(|connection| (connection.tuple.local, connection.tuple.remote));
        Ok(Self { dump, connections })
    }
}

fn external(tuple: FourTuple, tcp: ControlBlock, options: &[SocketOption]) -> Connection {
    let options = options.iter().map(|option| (options::name(option), options::value(option))).collect();
    Connection { tuple, tcp, options, inode: None, net_ns_id: None, owners: Vec::new() }
}

fn of_index(dir: &ImageDir, index: &Index) -> Result<Vec<Connection>> {
    let owners = owners(index);
    let mut queues = Queues::default();
    let mut connections = Vec::new();
    for (id, socket) in index.connections.iter().filter(|(_, socket)| socket.has_stream) {
        let image = TcpStreamImage::read(dir, socket.ino, socket.state, &mut queues)?;
        connections.push(Connection {
            tuple: socket.tuple,
            tcp: image.tcp,
            options: options_of(socket),
            inode: Some(socket.ino),
            net_ns_id: socket.net_ns_id,
            owners: owners.get(id).cloned().unwrap_or_default(),
        });
    }
    Ok(connections)
}

/// Those that the index keeps of the many in CRIU's images, named as those of other images.
fn options_of(socket: &InetConnection) -> BTreeMap<String, String> {
    let flag = |on: bool| u8::from(on).to_string();
    let mut options = BTreeMap::from([("SO_REUSEADDR".to_owned(), flag(socket.reuseaddr))]);
    options.extend(socket.reuseport.map(|on| ("SO_REUSEPORT".to_owned(), flag(on))));
    let device = socket.bound_device.as_deref().unwrap_or_default();
    options.insert("SO_BINDTODEVICE".into(), device.into());
    options
}

/// Which descriptors lead to which file.
fn owners(index: &Index) -> HashMap<u32, Vec<Owner>> {
    let mut owners: HashMap<u32, Vec<Owner>> = HashMap::new();
    for (pid, task) in &index.tasks {
        for fd in task.fds.iter() {
            let owner = Owner { pid: *pid, fd: fd.fd, in_flight: false };
            owners.entry(fd.file_id).or_default().push(owner);
            let packets = index.in_flight.get(&fd.file_id).into_iter().flatten();
            for file in packets.flat_map(|packet| &packet.files) {
                owners.entry(*file).or_default().push(Owner { in_flight: true, ..owner });
            }
        }
    }
    owners
}
